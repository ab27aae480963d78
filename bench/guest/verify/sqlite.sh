set -e
d=$(mktemp -d "$TMPDIR/sql.XXXXXX")
trap 'rm -rf "$d"' EXIT
sqlite3 :memory: <sh/rows.sql
sqlite3 "$d/x.db" 'PRAGMA journal_mode=WAL;' <sh/rows.sql >/dev/null
sqlite3 "$d/x.db" <sh/rows.sql 2>&1 | tail -n 3
sqlite3 "$d/x.db" 'PRAGMA integrity_check; SELECT count(*), sum(id), total(price) FROM item; VACUUM;'
sqlite3 "$d/x.db" .dump | sha256sum
sqlite3 :memory: "WITH RECURSIVE m(x, y, cx, cy, i) AS (
  SELECT a.v / 40.0 - 2.0, b.v / 20.0 - 1.0, a.v / 40.0 - 2.0, b.v / 20.0 - 1.0, 0
  FROM (WITH RECURSIVE r(v) AS (SELECT 0 UNION ALL SELECT v + 1 FROM r WHERE v < 119) SELECT v FROM r) a,
       (WITH RECURSIVE r(v) AS (SELECT 0 UNION ALL SELECT v + 1 FROM r WHERE v < 39) SELECT v FROM r) b
  UNION ALL SELECT x * x - y * y + cx, 2 * x * y + cy, cx, cy, i + 1 FROM m WHERE x * x + y * y < 4 AND i < 28)
  SELECT count(*), max(i), printf('%.15g', total(x)) FROM m;"
