"""Recorded output of load tools: wrk 4.1.0 and h2load 1.52.0."""

WRK = """\
Running 1s test @ http://127.0.0.1:9130/x
  1 threads and 8 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   288.45us  150.12us   3.29ms   87.99%
    Req/Sec    27.80k     4.55k   33.99k    63.64%
  Latency Distribution
     50%  238.00us
     75%  349.00us
     90%  455.00us
     99%  692.00us
  30419 requests in 1.10s, 8.12MB read
Requests/sec:  27658.64
Transfer/sec:      7.39MB
"""
#: The line that serving_load.wrk_script prints.
WRK += (
    '{"requests": 30419, "us": 1099801, "p50_us": 238, "p99_us": 692, '
    '"errors": {"connect": 0, "read": 0, "write": 0, "status": 0, "timeout": 0}}\n'
)

H2LOAD = """\
starting benchmark...
spawning thread #0: 8 total client(s). Timing-based test with 0s of warm-up time and 1s of main duration for measurements.
Warm-up started for thread #0.
progress: 100% of clients started
Warm-up phase is over for thread #0.
Main benchmark duration is started for thread #0.
Application protocol: h2c
Main benchmark duration is over for thread #0. Stopping all clients.
Stopped all clients for thread #0

finished in 1.00s, 5703.00 req/s, 915.11KB/s
requests: 5703 total, 5711 started, 5703 done, 5703 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 5703 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 915.11KB (937073) total, 17.29KB (17709) headers (space savings 96.17%), 584.78KB (598815) data
                     min         max         mean         sd        +/- sd
time for request:      279us      5.31ms      1.39ms       329us    88.11%
time for connect:       54us       122us        94us        22us    75.00%
time to 1st byte:     3.65ms      4.71ms      3.84ms       355us    87.50%
req/s           :     709.84      716.78      712.69        2.34    75.00%
"""
#: The form of its log; some rows.
H2LOAD_LOG = "".join(f"{1795788457245579 + us}\t200\t{us}\n" for us in (3457, 3517, 1400, 1390, 279))
