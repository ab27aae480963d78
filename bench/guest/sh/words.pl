use strict;
use warnings;
my (%seen, %size, $n);
while (<>) {
    next unless m{^(\d+)\.(\d+)\.(\d+)\.(\d+) .*"([A-Z]+) /p/(\d+)\.html" (\d+) (\d+)$};
    $seen{"$5 $7"}++;
    push @{$size{$6 % 97}}, $8;
    $n += ($1 * 16777216 + $2 * 65536 + $3 * 256 + $4) % 4093;
}
print "$_ $seen{$_}\n" for sort keys %seen;
for my $k (sort { $a <=> $b } keys %size) {
    my @s = sort { $a <=> $b } @{$size{$k}};
    print "$k $s[0] $s[@s / 2] $s[-1]\n";
}
print "$n\n";
