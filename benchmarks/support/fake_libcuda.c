/* A CUDA driver library without a GPU: every call succeeds, a launch records its configuration and parameters.

   Triton's real launcher, the C code included, links and runs against it; only the driver's own work is missing. */
#include <cuda.h>
#include <stdint.h>
#include <string.h>

#define MAX_PARAMETERS 128

/* The last launch; cuLaunchKernelEx is not told how many parameters there are or of which size: fake_sizes says so, for
   one launch alone. Another kernel may have fewer: what lies behind its last one is not to be read. */
struct {
  uint64_t count, function, stream, shared, block;
  uint64_t grid[3];
  uint64_t parameters[MAX_PARAMETERS]; /* words: a descriptor takes 16 of them */
} fake_launch;
int fake_sizes[MAX_PARAMETERS];

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  fake_launch.count++;
  fake_launch.function = (uint64_t)(uintptr_t)function;
  fake_launch.stream = (uint64_t)(uintptr_t)config->hStream;
  fake_launch.shared = config->sharedMemBytes;
  fake_launch.block = config->blockDimX;
  fake_launch.grid[0] = config->gridDimX;
  fake_launch.grid[1] = config->gridDimY;
  fake_launch.grid[2] = config->gridDimZ;
  for (int i = 0, word = 0; i < MAX_PARAMETERS && fake_sizes[i]; i++) {
    int words = (fake_sizes[i] + 7) / 8;
    if (word + words > MAX_PARAMETERS) return CUDA_ERROR_INVALID_VALUE;
    fake_launch.parameters[word] = 0;
    memcpy(&fake_launch.parameters[word], parameters[i], fake_sizes[i]);
    word += words;
    fake_sizes[i] = 0;
  }
  return CUDA_SUCCESS;
}

/* A descriptor for the tensor memory accelerator: in place of the driver's bits, what it was asked for, the address
   first. Refuses what the driver does. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  uint64_t words[16] = {(uint64_t)(uintptr_t)address, sizes[0], sizes[1], strides[0], box[0], box[1], type, swizzle};
  static const uint64_t item_bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static const uint64_t row_bytes[] = {1 << 30, 32, 64, 128};
  uint64_t row = box[0] * item_bytes[type];
  memcpy(map, words, sizeof words);
  return rank == 2 && words[0] % 16 == 0 && strides[0] % 16 == 0 && sizes[0] && sizes[1] && box[0] && box[0] <= 256 &&
                 box[1] && box[1] <= 256 && row % 16 == 0 && row <= row_bytes[swizzle]
             ? CUDA_SUCCESS
             : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 1 << 16; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  default: *value = 1024;
  }
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)1, CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static uintptr_t functions;
  return *function = (CUfunction)++functions, CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "an error", CUDA_SUCCESS; }
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 0, CUDA_SUCCESS; }  // Triton may ask where it looks for a driver
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
