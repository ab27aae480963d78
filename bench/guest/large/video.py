"""A raw video (Y4M, 4:2:0, 352 x 288) of moving shapes and a little noise; the argument is the number of frames."""
import sys

WIDTH, HEIGHT = 352, 288
out = sys.stdout.buffer
out.write(b"YUV4MPEG2 W%d H%d F25:1 Ip A1:1 C420jpeg\n" % (WIDTH, HEIGHT))
state = 1


def noise(n):
    global state
    data = bytearray()
    while len(data) < n:
        state = (state * 6364136223846793005 + 1442695040888963407) & 0xFFFFFFFFFFFFFFFF
        data += (state >> 16).to_bytes(6, "little")
    return data[:n]


for frame in range(int(sys.argv[1])):
    luma = bytearray()
    for y in range(HEIGHT):
        row = bytearray((x * 3 + y * 2 + frame * 5) // 4 & 0xFF for x in range(WIDTH))
        left = (frame * 6 + y // 3) % (WIDTH - 60)
        if 60 <= y < 160:
            row[left : left + 60] = bytes([40 + y]) * 60
        grain = noise(WIDTH // 4)
        for x, value in enumerate(grain):
            row[x * 4] = row[x * 4] & 0xF8 | value & 7
        luma += row
    out.write(b"FRAME\n" + luma)
    for plane in range(2):
        out.write(bytearray((x * 2 + y + frame * (2 + plane)) & 0xFF for y in range(HEIGHT // 2) for x in range(WIDTH // 2)))
