"""The Open Inference Protocol over HTTP, on uvicorn."""
