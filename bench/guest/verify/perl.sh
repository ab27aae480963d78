set -e
perl sh/words.pl data/log.txt | sha256sum
perl -e '
use strict; use warnings; use POSIX (); use List::Util qw(sum reduce); use Digest::SHA qw(sha512_hex);
my $s = 42; sub r { $s = ($s * 1103515245 + 12345) % 2147483648 }
my @n = map { r() } 1 .. 20000;
my @t = sort { $a <=> $b } @n; print "@t[0,1,9999,-1]\n";
my %h; $h{$_ % 977}++ for @n; print join(",", map { "$_=$h{$_}" } (sort { $h{$b} <=> $h{$a} || $a <=> $b } keys %h)[0 .. 9]), "\n";
my $text = join " ", map { chr(97 + $_ % 26) x (1 + $_ % 3) } @n;
my $c = () = $text =~ /(?:(\w)\1)(?= [aeiou])/g; print "$c ", sha512_hex($text), "\n";
(my $u = $text) =~ tr/a-y/b-z/; $u =~ s/(\w+) (\w+)/$2-$1/g; print substr($u, 1000, 60), "\n";
printf "%.17g %.17g %.17g %e\n", sin(1), exp(-3.7), sqrt(2) ** 5.5, 1e308 * 10;
print POSIX::floor(-2.5), " ", POSIX::fmod(10.5, 3), " ", int(-7 / 2), " ", -7 % 3, " ", 2 ** 53 + 1, "\n";
print pack("NnCa4w", 1 << 31, 65534, 200, "ab", 12345678) =~ s/(.)/sprintf "%02x", ord $1/gesr, "\n";
my $p = open my $f, "-|", "echo from a child" or die; print <$f>; close $f;
my $sum = reduce { ($a * 31 + $b) % 1000003 } @n; print "$sum ", sum(@n), "\n";
eval { die { code => 7 } }; print "caught $@->{code}\n";
'
