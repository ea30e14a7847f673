"""The Open Inference Protocol, version 2, as plain data: decodes requests and encodes answers. No HTTP and no engine."""
