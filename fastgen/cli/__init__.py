"""The `fastgen` command; one module per sub-command."""
