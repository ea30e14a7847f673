"""The Open Inference Protocol over gRPC, on grpc.aio, in the event loop of the HTTP server."""

import os

# gRPC writes faults that clients cause to standard error; calls are logged instead. It reads the variable when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
