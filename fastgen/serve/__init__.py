"""The methods behind an HTTP interface: OpenAI's routes for images, shared batches, and a web page."""
