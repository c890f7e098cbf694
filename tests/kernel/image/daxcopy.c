/*
 * Copies between a device-dax character device and a pipe, because such a device has no read and
 * no write: only mmap, at multiples of its alignment.
 *
 *     daxcopy read DEVICE OFFSET LENGTH > FILE
 *     daxcopy write DEVICE OFFSET < FILE
 *
 * What this does not do: flush caches. In the guest the media are pages that QEMU shares with the
 * image file.
 */

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PIECE_BYTES = 1 << 20 };

static void fail(const char *what)
{
    fprintf(stderr, "daxcopy: %s: %s\n", what, strerror(errno));
    exit(1);
}

static unsigned long long attribute(const char *device, const char *name)
{
    char path[256], copy[128];
    unsigned long long value = 0;
    snprintf(copy, sizeof copy, "%s", device);
    snprintf(path, sizeof path, "/sys/bus/dax/devices/%s/%s", basename(copy), name);
    FILE *file = fopen(path, "r");
    if (!file || fscanf(file, "%llu", &value) != 1 || value == 0)
        fail(path);
    fclose(file);
    return value;
}

/* Bytes of at most one alignment unit are mapped at a time, so that the end of the device, which
 * need not be a multiple of a larger window, is never passed. */
static size_t piece(int device, unsigned long long align, unsigned long long offset,
                    unsigned char *buffer, size_t length, int writing)
{
    unsigned long long window = offset / align * align;
    size_t within = offset - window;
    if (length > align - within)
        length = align - within;
    unsigned char *map =
        mmap(NULL, align, PROT_READ | PROT_WRITE, MAP_SHARED, device, (off_t)window);
    if (map == MAP_FAILED)
        fail("mmap");
    if (writing)
        memcpy(map + within, buffer, length);
    else
        memcpy(buffer, map + within, length);
    munmap(map, align);
    return length;
}

static void copy(int device, unsigned long long align, unsigned long long offset,
                 unsigned char *buffer, size_t length, int writing)
{
    for (size_t done = 0; done < length;)
        done += piece(device, align, offset + done, buffer + done, length - done, writing);
}

int main(int count, char **words)
{
    int writing = count == 4 && strcmp(words[1], "write") == 0;
    if (!writing && !(count == 5 && strcmp(words[1], "read") == 0)) {
        fprintf(stderr, "usage: daxcopy read DEVICE OFFSET LENGTH | daxcopy write DEVICE OFFSET\n");
        return 2;
    }
    unsigned long long align = attribute(words[2], "align"), size = attribute(words[2], "size");
    unsigned long long offset = strtoull(words[3], NULL, 0);
    unsigned long long left = writing ? size : strtoull(words[4], NULL, 0);
    unsigned char *buffer = malloc(PIECE_BYTES);
    int device = open(words[2], O_RDWR);
    if (device < 0 || !buffer)
        fail(words[2]);
    while (left > 0) {
        size_t length = left < PIECE_BYTES ? left : PIECE_BYTES;
        if (writing && (length = fread(buffer, 1, length, stdin)) == 0)
            break;
        errno = ENXIO;
        if (offset > size || length > size - offset)
            fail("beyond the end of the device");
        copy(device, align, offset, buffer, length, writing);
        if (!writing && fwrite(buffer, 1, length, stdout) != length)
            fail("stdout");
        offset += length;
        left -= length;
    }
    return fflush(stdout) == 0 ? 0 : 1;
}
