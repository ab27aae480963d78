// Many goroutines: a ring that passes a token, a pool fed by channels, a shared map under a lock, timers, and garbage for the collector.
package main

import (
	"fmt"
	"sort"
	"strings"
	"sync"
	"time"
)

func ring(members, turns int) int {
	first := make(chan int)
	in := first
	for i := 0; i < members; i++ {
		out := make(chan int)
		go func(in, out chan int, i int) {
			for v := range in {
				out <- v + i%3
			}
			close(out)
		}(in, out, i)
		in = out
	}
	sum := 0
	for t := 0; t < turns; t++ {
		first <- t
		sum += <-in
	}
	close(first)
	return sum
}

func collatz(n int) int {
	steps := 0
	for n != 1 {
		if n%2 == 0 {
			n /= 2
		} else {
			n = 3*n + 1
		}
		steps++
	}
	return steps
}

func pool(workers, jobs int) int {
	in, out := make(chan int, 64), make(chan int, 64)
	var wait sync.WaitGroup
	for w := 0; w < workers; w++ {
		wait.Add(1)
		go func() {
			defer wait.Done()
			for n := range in {
				out <- collatz(n)
			}
		}()
	}
	go func() {
		for j := 1; j <= jobs; j++ {
			in <- j
		}
		close(in)
		wait.Wait()
		close(out)
	}()
	sum := 0
	for s := range out {
		sum += s
	}
	return sum
}

func words(goroutines int) string {
	counts := map[string]int{}
	var lock sync.Mutex
	var wait sync.WaitGroup
	for g := 0; g < goroutines; g++ {
		wait.Add(1)
		go func(g int) {
			defer wait.Done()
			var b strings.Builder
			for i := 0; i < 60; i++ {
				b.Reset()
				fmt.Fprintf(&b, "w%d", (g*31+i*17)%503)
				lock.Lock()
				counts[b.String()]++
				lock.Unlock()
			}
		}(g)
	}
	wait.Wait()
	keys := make([]string, 0, len(counts))
	for k := range counts {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	hash := 0
	for _, k := range keys {
		hash = (hash*31 + counts[k]*len(k)) % 1000000007
	}
	return fmt.Sprint(len(keys), " ", hash)
}

type node struct{ left, right *node }

func grow(depth int) *node {
	if depth == 0 {
		return &node{}
	}
	return &node{grow(depth - 1), grow(depth - 1)}
}

func (n *node) count() int {
	if n.left == nil {
		return 1
	}
	return n.left.count() + n.right.count() + 1
}

func sleepers(n int) int {
	done := make(chan int, n)
	for i := 0; i < n; i++ {
		go func(i int) {
			time.Sleep(time.Duration(i%5) * time.Millisecond)
			done <- i
		}(i)
	}
	sum := 0
	for i := 0; i < n; i++ {
		select {
		case v := <-done:
			sum += v
		case <-time.After(30 * time.Second):
			return -1
		}
	}
	return sum
}

func main() {
	trees := 0
	for i := 0; i < 20; i++ {
		trees += grow(14).count()
	}
	fmt.Println(ring(500, 400), pool(64, 100000), words(2000), sleepers(5000), trees)
}
