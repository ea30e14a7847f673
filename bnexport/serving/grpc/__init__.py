"""The Open Inference Protocol over gRPC, on grpc.aio, in the event loop of the HTTP door."""

import os

# What gRPC says on standard error are faults that clients can bring about; calls are logged. It asks when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
