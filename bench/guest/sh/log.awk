{
    bytes[$1] += $NF
    status[$(NF - 1)]++
    split($4, t, ":")
    hour[t[2]]++
    if ($7 ~ /[37]\.html$/) odd += length($7)
}
END {
    for (h = 0; h < 24; h++) printf "%02d %d\n", h, hour[sprintf("%02d", h)]
    for (i = 0; i < 4; i++) for (j = 0; j < 256; j += 51) { k = "10." i "." j ".7"; total += bytes[k] }
    print status["200"], status["404"], total, odd
}
