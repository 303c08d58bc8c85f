/* Stands in for libcuda.so.1: remembers the last launch, and answers the questions of Triton's launcher.
   tests/stub_driver.py builds it. */

#include "cuda.h"
#include <string.h>

/* Set by the tests before a launch: how many parameters the kernel has, and the size of each. */
int parameter_count = 0;
int parameter_sizes[64];

/* What the last launch was, and how many there were. */
int launches = 0;
unsigned long long numbers[10];
unsigned char parameters[64][8];

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **values, void **extra) {
  unsigned long long seen[] = {config->gridDimX, config->gridDimY, config->gridDimZ,
                               config->blockDimX, config->blockDimY, config->blockDimZ,
                               config->sharedMemBytes, (unsigned long long)config->hStream,
                               (unsigned long long)function, config->numAttrs};
  memcpy(numbers, seen, sizeof(seen));
  memset(parameters, 0, sizeof(parameters));
  for (int i = 0; i < parameter_count; i++)
    memcpy(parameters[i], values[i], parameter_sizes[i]);
  launches++;
  return CUDA_SUCCESS;
}

static int next = 1;

#define ANSWER(name, parameters, ...)                                                              \
  CUresult name parameters {                                                                       \
    __VA_ARGS__;                                                                                   \
    return CUDA_SUCCESS;                                                                           \
  }

ANSWER(cuInit, (unsigned int flags))
ANSWER(cuDriverGetVersion, (int *version), *version = 13000)
ANSWER(cuDeviceGet, (CUdevice * device, int ordinal), *device = ordinal)
ANSWER(cuDeviceGetCount, (int *count), *count = 1)
ANSWER(cuDeviceGetAttribute, (int *value, CUdevice_attribute attribute, CUdevice device), *value = 227 * 1024)
ANSWER(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device), *context = (CUcontext)1)
ANSWER(cuCtxGetCurrent, (CUcontext * context), *context = (CUcontext)1)
ANSWER(cuCtxSetCurrent, (CUcontext context))
ANSWER(cuCtxGetDevice, (CUdevice * device), *device = 0)
ANSWER(cuCtxGetLimit, (size_t * value, CUlimit limit), *value = 0)
ANSWER(cuCtxSetLimit, (CUlimit limit, size_t value))
ANSWER(cuModuleLoadData, (CUmodule * module, const void *image), *module = (CUmodule)1)
ANSWER(cuModuleUnload, (CUmodule module))
ANSWER(cuModuleGetFunction, (CUfunction * function, CUmodule module, const char *name),
       *function = (CUfunction)(long long)(next++))
ANSWER(cuFuncGetAttribute, (int *value, CUfunction_attribute attribute, CUfunction function), *value = 1024)
ANSWER(cuFuncSetAttribute, (CUfunction function, CUfunction_attribute attribute, int value))
ANSWER(cuFuncSetCacheConfig, (CUfunction function, CUfunc_cache config))
ANSWER(cuGetErrorString, (CUresult error, const char **text), *text = "an error")
ANSWER(cuPointerGetAttribute, (void *data, CUpointer_attribute attribute, CUdeviceptr pointer),
       *(CUdeviceptr *)data = pointer)
ANSWER(cuStreamIsCapturing, (CUstream stream, CUstreamCaptureStatus *status),
       *status = CU_STREAM_CAPTURE_STATUS_NONE)
ANSWER(cuOccupancyMaxActiveClusters, (int *count, CUfunction function, const CUlaunchConfig *config), *count = 0)
