"""Hours of traffic on a server in minutes: right and malformed requests, broken-off ones, and processes killed in between."""
