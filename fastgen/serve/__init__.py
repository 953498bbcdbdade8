"""The methods behind an HTTP interface: OpenAI's routes for images, shared batches, and a page to look at."""
