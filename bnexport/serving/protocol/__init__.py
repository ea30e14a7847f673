"""The Open Inference Protocol, version 2, as plain data: requests decoded, answers encoded. No HTTP and no engine."""
