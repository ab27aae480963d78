CREATE TABLE item (id INTEGER PRIMARY KEY, shelf INTEGER, name TEXT, price REAL);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
INSERT INTO item SELECT i, i * 7919 % 501, 'item ' || (i * 104729 % 99991), (i * 31 % 10007) / 16.0 FROM n;
CREATE INDEX by_shelf ON item (shelf, price);
SELECT shelf, count(*), round(sum(price), 2), max(name) FROM item GROUP BY shelf ORDER BY 3 DESC LIMIT 20;
UPDATE item SET price = price * 2 WHERE shelf % 5 = 0;
DELETE FROM item WHERE id % 9 = 0;
SELECT count(*), sum(price) FROM item WHERE name LIKE '%77%';
SELECT a.shelf, b.id FROM item a JOIN item b ON b.shelf = a.shelf AND b.price < a.price WHERE a.id % 6001 = 1 ORDER BY 1, 2 LIMIT 15;
