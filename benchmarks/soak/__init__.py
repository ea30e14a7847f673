"""Traffic on a server whose processes are killed, and the verdict on the server."""
