-- wrk -s post.lua URL -- BODIES: posts the lines of the file BODIES in turn and ends with one line
-- of JSON: microseconds and counts.
local requests, next_one = {}, 0

function init(args)
  for line in io.lines(args[1]) do
    requests[#requests + 1] =
      wrk.format("POST", nil, {["content-type"] = "application/json"}, line)
  end
end

function request()
  next_one = next_one % #requests + 1
  return requests[next_one]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '{"requests": %d, "duration": %d, "errors": %d, "p50": %d, "p95": %d, "p99": %d}\n',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(95), latency:percentile(99)))
end
