-- A mixture for a tracing compiler: floating point, tables, strings, closures, garbage.
local seed = 42
local function random(n) seed = (seed * 16807) % 2147483647 return seed % n end

local function spectral(n)
  local function a(i, j) return 1 / ((i + j) * (i + j + 1) / 2 + i + 1) end
  local function times(v, transposed)
    local r = {}
    for i = 0, n - 1 do
      local s = 0
      for j = 0, n - 1 do s = s + (transposed and a(j, i) or a(i, j)) * v[j] end
      r[i] = s
    end
    return r
  end
  local u = {}
  for i = 0, n - 1 do u[i] = 1 end
  local v
  for _ = 1, 6 do v = times(times(u, false), true) u = times(times(v, false), true) end
  local uv, vv = 0, 0
  for i = 0, n - 1 do uv = uv + u[i] * v[i] vv = vv + v[i] * v[i] end
  return string.format("%.9f", math.sqrt(uv / vv))
end

local function strings()
  local parts = {}
  for i = 1, 120000 do parts[i] = string.format("%x%s", random(65536), i % 3 == 0 and "," or "") end
  local s = table.concat(parts)
  local n = 0
  for word in s:gmatch("%x+,") do n = n + #word end
  return n .. s:gsub("a(%x)", "%1b"):sub(1, 20):upper()
end

local function queens(n)
  local count, rows, up, down = 0, {}, {}, {}
  local function place(c)
    if c > n then count = count + 1 return end
    for r = 1, n do
      if not rows[r] and not up[r + c] and not down[r - c] then
        rows[r], up[r + c], down[r - c] = true, true, true
        place(c + 1)
        rows[r], up[r + c], down[r - c] = nil, nil, nil
      end
    end
  end
  place(1)
  return count
end

local function objects()
  local mt = { __index = function(t, k) return k * 2 end, __add = function(a, b) return { v = a.v + b.v } end }
  local s = setmetatable({ v = 0 }, mt)
  for i = 1, 400000 do
    local o = setmetatable({ v = i % 7 + s[i % 3 + 1] }, mt)
    s = setmetatable(s + o, mt)
  end
  return s.v
end

local function sorting()
  local t = {}
  for i = 1, 150000 do t[i] = random(1000000) end
  table.sort(t, function(a, b) return a < b end)
  local h = 0
  for i = 1, #t, 100 do h = (h * 31 + t[i]) % 1000000007 end
  return h
end

print(spectral(300), strings(), queens(8), objects(), sorting())
