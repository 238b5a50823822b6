/* One tensor of a revealing model, a number a line: weights TENSOR COUNT EXPONENT SIGNED */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static float weight(uint32_t tensor, uint32_t n, int exponent, int is_signed) {
    uint32_t x = 0x9E3779B9u * (tensor + 1) + n;
    x = (x ^ x >> 16) * 0x7FEB352Du;
    x = (x ^ x >> 15) * 0x846CA68Bu;
    int b = (x ^ x >> 16) >> 24;
    return (float)(is_signed ? 2 * b - 255 : b) / (float)(1 << exponent);
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    uint32_t tensor = strtoul(argv[1], 0, 10), count = strtoul(argv[2], 0, 10);
    for (uint32_t n = 0; n < count; n++) printf("%.9g\n", weight(tensor, n, atoi(argv[3]), atoi(argv[4])));
    return 0;
}
