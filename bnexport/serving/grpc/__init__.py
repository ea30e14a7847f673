"""The Open Inference Protocol over gRPC, on grpc.aio, in the event loop of the HTTP door."""
