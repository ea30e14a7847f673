/* The functions of CUDA, cuBLAS and cuDNN whose results onnxruntime's CUDA provider uses. Every other function is a weak
 * symbol that reports success (build.py). Device memory is zeroed host memory, kernels are never started, and copies are
 * real, so a session opens, places its nodes and moves data; computed values are without meaning. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <driver_types.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, UNKNOWN_SYMBOL = 500 };
enum { ALIGNMENT = 256, MULTIPROCESSORS = 132, MAJOR = 9, MINOR = 0 };
static const size_t TOTAL = (size_t)16 << 30;

/* Device */

int cudaGetDeviceCount(int *count) { return *count = 1, SUCCESS; }
int cudaGetDevice(int *device) { return *device = 0, SUCCESS; }

int cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    (void)device;
    memset(found, 0, sizeof *found);
    strcpy(found->name, "fake GPU");
    found->major = MAJOR;
    found->minor = MINOR;
    found->multiProcessorCount = MULTIPROCESSORS;
    found->warpSize = 32;
    found->maxThreadsPerBlock = 1024;
    found->maxThreadsPerMultiProcessor = 2048;
    found->totalGlobalMem = TOTAL;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = 227 << 10;
    found->regsPerBlock = 1 << 16;
    found->maxGridSize[0] = INT32_MAX;
    found->maxGridSize[1] = found->maxGridSize[2] = UINT16_MAX;
    return SUCCESS;
}

int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    (void)device;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = MINOR; break;
    case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; break;
    default: *value = 1024;
    }
    return SUCCESS;
}

int cudaRuntimeGetVersion(int *version) { return *version = 13000, SUCCESS; }
int cudaDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
const char *cudaGetErrorName(int error) { return (void)error, "fake CUDA error"; }
const char *cudaGetErrorString(int error) { return error == OUT_OF_MEMORY ? "out of memory" : "fake CUDA error"; }

/* Memory. FAKE_CUDA_MEMORY is the largest allocation in bytes: a full GPU. */

static int allocate(void **place, size_t bytes) {
    const char *limit = getenv("FAKE_CUDA_MEMORY");
    size_t whole = (bytes / ALIGNMENT + 1) * ALIGNMENT;
    *place = limit && bytes > strtoull(limit, NULL, 10) ? NULL : aligned_alloc(ALIGNMENT, whole);
    if (*place == NULL) return OUT_OF_MEMORY;
    memset(*place, 0, whole);
    return SUCCESS;
}

static int copy(void *to, const void *from, size_t bytes) {
    if (bytes) memmove(to, from, bytes);
    return SUCCESS;
}

int cudaMemGetInfo(size_t *unused, size_t *total) { return *unused = *total = TOTAL, SUCCESS; }
int cudaMalloc(void **place, size_t bytes) { return allocate(place, bytes); }
int cudaMallocHost(void **place, size_t bytes) { return allocate(place, bytes); }
int cudaHostAlloc(void **place, size_t bytes, unsigned flags) { return (void)flags, allocate(place, bytes); }
int cudaFree(void *place) { return free(place), SUCCESS; }
int cudaFreeHost(void *place) { return free(place), SUCCESS; }
int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) { return (void)kind, copy(to, from, bytes); }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    return (void)kind, (void)stream, copy(to, from, bytes);
}
int cudaMemset(void *to, int byte, size_t bytes) { return memset(to, byte, bytes), SUCCESS; }
int cudaMemsetAsync(void *to, int byte, size_t bytes, void *stream) { return (void)stream, cudaMemset(to, byte, bytes); }

int cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *place) {
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeDevice;
    found->devicePointer = (void *)place;
    return SUCCESS;
}

/* Handles: addresses that differ and are never read. */

static int handle(void **place) { return (*place = malloc(1)) ? SUCCESS : OUT_OF_MEMORY; }

int cudaStreamCreate(void **stream) { return handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return (void)flags, handle(stream); }
int cudaStreamIsCapturing(void *stream, int *status) { return (void)stream, *status = 0, SUCCESS; }
int cudaEventCreate(void **event) { return handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return (void)flags, handle(event); }
int cublasCreate_v2(void **made) { return handle(made); }
int cublasLtCreate(void **made) { return handle(made); }
int cublasGetMathMode(void *made, int *mode) { return (void)made, *mode = 0, SUCCESS; }
int cudnnCreate(void **made) { return handle(made); }
size_t cudnnGetVersion(void) { return 92400; }
const char *cudnnGetErrorString(int error) { return (void)error, "fake cuDNN error"; }
int cudnnGetReductionWorkspaceSize(void *made, void *how, void *from, void *to, size_t *bytes) {
    return *bytes = 0, SUCCESS;
}
int cudnnGetReductionIndicesSize(void *made, void *how, void *from, void *to, size_t *bytes) {
    return *bytes = 0, SUCCESS;
}

/* cuDNN's graphs: one engine configuration for every graph, without notes, knobs and workspace. */

enum { TYPE_INT64 = 3, TYPE_INT32 = 23, ATTR_HEURISTIC_RESULTS = 202, ATTR_CONFIGURATION_ENGINE = 300 };

int cudnnBackendCreateDescriptor(int kind, void **made) { return (void)kind, handle(made); }
int cudnnBackendGetAttribute(void *made, int name, int type, int64_t asked, int64_t *given, void *values) {
    size_t size = type == TYPE_INT64 ? sizeof(int64_t) : type == TYPE_INT32 ? sizeof(int32_t) : 0;
    if (given) *given = size || name == ATTR_HEURISTIC_RESULTS || name == ATTR_CONFIGURATION_ENGINE;
    if (values && asked > 0) memset(values, 0, size);
    return (void)made, SUCCESS;
}

/* Registration of kernels when the provider is loaded, and questions about kernels. */

void **__cudaRegisterFatBinary(void *binary) { return binary; }
int cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    (void)kernel;
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    return SUCCESS;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int size, size_t shared,
                                                           unsigned flags) {
    return (void)kernel, (void)size, (void)shared, (void)flags, *blocks = 2, SUCCESS;
}
int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags, int *found) {
    return (void)name, (void)version, (void)flags, (void)found, *function = NULL, UNKNOWN_SYMBOL;
}
