-- Two implementations of one thing, and random inputs for both: what examples/fuzz warms once and forks.
-- Run-length coding, "aaab" is "3a1b". The second one is wrong for runs that are longer than its buffer.

local function slow(text)
  local out, at = {}, 1
  while at <= #text do
    local byte, length = text:sub(at, at), 1
    while text:sub(at + length, at + length) == byte do length = length + 1 end
    out[#out + 1] = length .. byte
    at = at + length
  end
  return table.concat(out)
end

local BUFFER = 64

local function fast(text)
  local out, at = {}, 1
  while at <= #text do
    local byte = text:sub(at, at)
    local _, stop = text:find("^" .. byte .. "+", at)
    local length = stop - at + 1
    if length > BUFFER then
      out[#out + 1] = BUFFER .. byte
      length = length - BUFFER
    end
    out[#out + 1] = length .. byte
    at = stop + 1
  end
  return table.concat(out)
end

-- Mostly short runs, seldom a long one.
local function input()
  local parts = {}
  for _ = 1, math.random(1, 20) do
    local longest = math.random(2000) == 1 and 90 or 6
    parts[#parts + 1] = string.char(math.random(97, 100)):rep(math.random(longest))
  end
  return table.concat(parts)
end

-- What a fuzzer would do once: here, enough inputs to warm the heap.
for _ = 1, 2000 do assert(#slow(input()) > 0) end

local vmm = assert(io.open("/dev/vmm", "w"))
assert(vmm:write("freeze\n"))
vmm:close()
-- From here on in the original, in every clone, and in a clone after each reset: a round, if there is one to do.
local seed, tries = (io.read("l") or ""):match("^(%d+) (%d+)$")
if not seed then os.exit(0) end
local answer = "same"
for try = 1, tries do
  -- Each input can be made again from what is printed.
  math.randomseed(seed, try)
  local text = input()
  local right, got = slow(text), fast(text)
  if right ~= got then
    answer = ("seed %d, try %d: %s is %s, not %s"):format(seed, try, text, right, got)
    break
  end
end
io.write(answer, "\n")
io.flush()
io.read("a") -- until it is reset, or its input ends
