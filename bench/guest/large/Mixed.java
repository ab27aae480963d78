import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;

/** A mixture for a virtual machine with two compilers: collections, streams, strings, threads, floating point, garbage. */
public class Mixed {
    static long seed = 7;

    static int random(int limit) {
        seed = seed * 6364136223846793005L + 1442695040888963407L;
        return (int) ((seed >>> 33) % limit);
    }

    interface Shape { double area(); }
    record Square(double side) implements Shape { public double area() { return side * side; } }
    record Circle(double r) implements Shape { public double area() { return 3.0 * r * r; } }
    record Strip(double a, double b) implements Shape { public double area() { return a * b; } }

    static double shapes() {
        Shape[] all = new Shape[3000];
        for (int i = 0; i < all.length; i++)
            all[i] = switch (random(3)) {
                case 0 -> new Square(random(100));
                case 1 -> new Circle(random(100));
                default -> new Strip(random(100), random(100));
            };
        double sum = 0;
        for (int turn = 0; turn < 2000; turn++)
            for (Shape s : all) sum += s.area();
        return sum;
    }

    static long maps() {
        Map<String, Integer> counts = new HashMap<>();
        for (int i = 0; i < 400000; i++) counts.merge("k" + random(20000), 1, Integer::sum);
        return new TreeMap<>(counts).entrySet().stream().mapToLong(e -> (long) e.getKey().hashCode() * e.getValue()).sum();
    }

    static String streams() {
        return IntStream.range(0, 300000).filter(i -> i % 3 != 0).mapToObj(Integer::toHexString).filter(s -> s.contains("a"))
            .collect(Collectors.groupingBy(String::length, TreeMap::new, Collectors.counting())).toString();
    }

    static double matrix(int n) {
        double[][] a = new double[n][n], b = new double[n][n], c = new double[n][n];
        for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) { a[i][j] = i + j; b[i][j] = i - j; }
        for (int i = 0; i < n; i++) for (int k = 0; k < n; k++) for (int j = 0; j < n; j++) c[i][j] += a[i][k] * b[k][j];
        return c[n / 2][n / 3];
    }

    static long threads() throws Exception {
        ConcurrentHashMap<Integer, Long> shared = new ConcurrentHashMap<>();
        ExecutorService pool = Executors.newFixedThreadPool(4);
        List<Future<Long>> jobs = new ArrayList<>();
        for (int t = 0; t < 16; t++) {
            int first = t;
            jobs.add(pool.submit(() -> {
                long sum = 0;
                for (int i = 0; i < 20000; i++) {
                    shared.merge(i % 997, 1L, Long::sum);
                    sum += (long) i * first;
                }
                return sum;
            }));
        }
        long sum = 0;
        for (Future<Long> job : jobs) sum += job.get();
        pool.shutdown();
        return sum + shared.values().stream().mapToLong(v -> v * v).sum();
    }

    static long garbage() {
        long sum = 0;
        LinkedList<int[]> kept = new LinkedList<>();
        for (int i = 0; i < 600000; i++) {
            kept.add(new int[] {i, i * 2, random(100)});
            if (kept.size() > 5000) sum += kept.removeFirst()[2];
        }
        return sum;
    }

    public static void main(String[] args) throws Exception {
        System.out.println(shapes() + " " + maps() + " " + streams() + " " + matrix(300) + " " + threads() + " " + garbage());
    }
}
