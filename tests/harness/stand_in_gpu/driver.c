/* The calls of the CUDA driver that BPipe makes, on host memory. See __init__.py. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef CUDA
#define CUDA 13000 /* its release, as cuDriverGetVersion says it */
#endif

enum { INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, REGISTERED_ALREADY = 712,
       NOT_REGISTERED = 713, NOT_SUPPORTED = 801, STILL_MAPPED = 999, COUNT = 4096 };

typedef struct { unsigned char bytes[64]; } handle;
typedef struct { int pid, descriptor; size_t size; } lent;
typedef struct { uint64_t address; size_t size; int descriptor; char kind; } span;

static span spans[1024];
size_t stand_in_capacity = (size_t)1 << 40;
int stand_in_ipc_forbidden = 0, stand_in_one_process = 0;
int (*stand_in_on_copy)(uint64_t, uint64_t, size_t, void *) = 0;
void (*stand_in_on_release)(uint64_t, size_t) = 0;

/* kinds: 'a' allocated, 'm' mapped from another process, 'p' pinned */
size_t stand_in_bytes(char kind) {
  size_t sum = 0;
  for (int i = 0; i < 1024; i++) sum += spans[i].kind == kind ? spans[i].size : 0;
  return sum;
}

static span *find(char kind, uint64_t address) {
  for (int i = 0; i < 1024; i++)
    if (spans[i].kind == kind && spans[i].address == address) return &spans[i];
  return 0;
}

static int keep(char kind, void *at, size_t size, int descriptor, uint64_t *address) {
  for (int i = 0; i < 1024; i++)
    if (!spans[i].kind) {
      spans[i] = (span){(uint64_t)(uintptr_t)at, size, descriptor, kind};
      if (address) *address = spans[i].address;
      return 0;
    }
  return OUT_OF_MEMORY;
}

int cuGetErrorString(int code, const char **text) {
  *text = code == OUT_OF_MEMORY ? "out of memory" : code == NOT_SUPPORTED ? "operation not supported"
        : code == STILL_MAPPED ? "freed while another process has it mapped"
        : "another error";
  return 0;
}

int stand_in_devices = 0;

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : 0; }

int cuDeviceGetCount(int *count) {
  *count = stand_in_devices;
  return 0;
}

int cuDriverGetVersion(int *version) {
  *version = CUDA;
  return 0;
}

int cuDeviceGet(int *device, int index) {
  *device = index;
  return index < 0 ? INVALID_VALUE : 0;
}

int cuDeviceGetPCIBusId(char *text, int size, int device) {
  return snprintf(text, size, "0000:%02X:00.0", 0x1B + device) < size ? 0 : INVALID_VALUE;
}

int cuMemAlloc_v2(uint64_t *address, size_t size) {
  if (!size) return INVALID_VALUE;
  if (stand_in_bytes('a') + size > stand_in_capacity) return OUT_OF_MEMORY;
  int descriptor = memfd_create("stand-in", MFD_CLOEXEC);
  if (descriptor < 0 || ftruncate(descriptor, size + COUNT)) return OUT_OF_MEMORY;
  void *at = mmap(0, size + COUNT, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  return at == MAP_FAILED ? OUT_OF_MEMORY : keep('a', at, size, descriptor, address);
}

/* how many processes have this memory mapped: behind its end, seen by all of them */
static int *mappings(const span *of) {
  return (int *)(uintptr_t)(of->address + (of->size + COUNT - 1) / COUNT * COUNT);
}

static int drop(char kind, uint64_t address) {
  span *found = find(kind, address);
  if (!found) return INVALID_VALUE;
  stand_in_on_release(address, found->size);
  munmap((void *)(uintptr_t)found->address, found->size + COUNT);
  close(found->descriptor);
  found->kind = 0;
  return 0;
}

int cuMemFree_v2(uint64_t address) {
  span *found = find('a', address);
  return found && *mappings(found) ? STILL_MAPPED : drop('a', address);
}

int cuIpcGetMemHandle(handle *to, uint64_t address) {
  span *found = find('a', address);
  if (!found) return INVALID_VALUE;
  lent text = {getpid(), found->descriptor, found->size};
  memset(to, 0, sizeof *to);
  memcpy(to, &text, sizeof text);
  return 0;
}

int cuIpcOpenMemHandle_v2(uint64_t *address, handle from, unsigned flags) {
  lent text;
  char path[64];
  memcpy(&text, &from, sizeof text);
  if (flags != 1) return INVALID_VALUE;
  if (stand_in_ipc_forbidden) return NOT_SUPPORTED;
  /* as CUDA: not in the process that lends, unless a test has both ends in one */
  if (text.pid == getpid() && !stand_in_one_process) return INVALID_CONTEXT;
  snprintf(path, sizeof path, "/proc/%d/fd/%d", text.pid, text.descriptor);
  int descriptor = open(path, O_RDWR | O_CLOEXEC);
  if (descriptor < 0) return INVALID_VALUE;
  void *at = mmap(0, text.size + COUNT, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (at == MAP_FAILED || keep('m', at, text.size, descriptor, address)) return OUT_OF_MEMORY;
  ++*mappings(find('m', *address));
  return 0;
}

int cuIpcCloseMemHandle(uint64_t address) {
  span *found = find('m', address);
  if (found) --*mappings(found);
  return drop('m', address);
}

int cuMemHostRegister_v2(void *at, size_t size, unsigned flags) {
  (void)flags;
  if (find('p', (uint64_t)(uintptr_t)at)) return REGISTERED_ALREADY;
  return keep('p', at, size, -1, 0);
}

int cuMemHostUnregister(void *at) {
  span *found = find('p', (uint64_t)(uintptr_t)at);
  if (!found) return NOT_REGISTERED;
  stand_in_on_release(found->address, found->size);
  found->kind = 0;
  return 0;
}

int stand_in_copy_calls = 0, stand_in_batch_refused = 0;

/* the bytes that lie within one piece of memory the driver knows of, or that it knows nothing of */
static int within(uint64_t address, size_t size) {
  for (int i = 0; i < 1024; i++)
    if (spans[i].kind && address >= spans[i].address && address < spans[i].address + spans[i].size)
      return address + size <= spans[i].address + spans[i].size;
  return 1;
}

static int copy(uint64_t target, uint64_t source, size_t size, void *stream) {
  if (!size || !within(target, size) || !within(source, size)) return INVALID_VALUE;
  return stand_in_on_copy(target, source, size, stream);
}

int cuMemcpyAsync(uint64_t target, uint64_t source, size_t size, void *stream) {
  stand_in_copy_calls++;
  return copy(target, source, size, stream);
}

#if CUDA >= 12080
typedef struct { int source_order, source_hint[2], target_hint[2]; unsigned flags; } attributes;

static int batch(uint64_t *targets, uint64_t *sources, size_t *sizes, size_t count,
                 attributes *how, size_t *from, size_t kinds, void *stream) {
  stand_in_copy_calls++;
  if (stand_in_batch_refused) return NOT_SUPPORTED;
  /* one kind of attributes, for all of them: read in stream order, beside computation */
  if (!count || !stream || kinds != 1 || from[0] || how->source_order != 1 || how->flags != 1)
    return INVALID_VALUE;
  for (size_t i = 0; i < count; i++) {
    int code = copy(targets[i], sources[i], sizes[i], stream);
    if (code) return code;
  }
  return 0;
}

int cuMemcpyBatchAsync(uint64_t *targets, uint64_t *sources, size_t *sizes, size_t count,
                       attributes *how, size_t *from, size_t kinds, size_t *failed, void *stream) {
  *failed = SIZE_MAX;
  return batch(targets, sources, sizes, count, how, from, kinds, stream);
}
#endif
#if CUDA >= 13000
int cuMemcpyBatchAsync_v2(uint64_t *targets, uint64_t *sources, size_t *sizes, size_t count,
                          attributes *how, size_t *from, size_t kinds, void *stream) {
  return batch(targets, sources, sizes, count, how, from, kinds, stream);
}
#endif

/* NVML, in the same library: which GPUs there are, and how each two are linked */
int stand_in_p2p_nvlink = 0, stand_in_p2p_write = 0;

int nvmlInitWithFlags(unsigned flags) { return flags; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code ? "an error" : "success"; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  enum { NOT_FOUND = 6 };
  *device = (void *)uuid;
  return strncmp(uuid, "GPU-", 4) || strstr(uuid, "MIG") ? NOT_FOUND : 0;
}

int nvmlDeviceGetP2PStatus(void *here, void *there, int what, unsigned *status) {
  enum { UNKNOWN = 6 };
  (void)here, (void)there;
  *status = what == 2 ? stand_in_p2p_nvlink : what == 1 ? stand_in_p2p_write : UNKNOWN;
  return 0;
}
