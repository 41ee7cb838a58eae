// The Python module maxva_kernels._C_cuda: fills the arguments of the kernels and launches them on a stream. It takes
// addresses, sizes and scalars; tensors are known to Python alone (maxva_kernels/gpu.py).
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <exception>
#include <map>
#include <utility>

#include "check.h"
#include "cuda/arguments.h"
#include "cuda/kernels.h"

namespace maxva::cuda {
namespace {

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError();  // what was reported here must not be found by whoever asks next
    MAXVA_CHECK(false, what, ": ", cudaGetErrorString(status), " (", cudaGetErrorName(status), ")");
  }
}

// Makes a device the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "asking for the current device");
    if (device != before_) {
      check_cuda(cudaSetDevice(device), "switching to the tensors' device");
      switched_ = true;
    }
  }
  ~DeviceGuard() {
    if (switched_) {
      cudaSetDevice(before_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

// The blocks of a kernel that the current device can hold at once.
int64_t resident_blocks(const Kernel& kernel, int device) {
  static std::map<std::pair<const void*, int>, int64_t> known;  // the interpreter's lock guards it
  const std::pair<const void*, int> key{kernel.function, device};
  if (const auto entry = known.find(key); entry != known.end()) {
    return entry->second;
  }
  int multiprocessors = 0, blocks = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "asking the device");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads, 0),
             "finding a kernel for this device");
  return known[key] = int64_t(multiprocessors) * std::max(blocks, 1);
}

void launch(const Kernel& kernel, int64_t blocks, void** arguments, uint64_t stream) {
  cudaError_t status;
  Py_BEGIN_ALLOW_THREADS;  // a full queue makes this wait
  status = cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(blocks)),
                            dim3(static_cast<unsigned>(kernel.threads)), arguments, 0,
                            reinterpret_cast<cudaStream_t>(stream));
  Py_END_ALLOW_THREADS;
  check_cuda(status, "launching a kernel");
}

// Launches as many blocks as the device holds at once, or as there are chunks.
template <typename Launch, typename Input>
void launch_over_chunks(const Kernel& kernel, const Input& input, int device, uint64_t stream) {
  MAXVA_CHECK(kernel.function != nullptr, "there is no kernel for these dtypes");
  Launch arguments;
  fill(arguments, input);
  const DeviceGuard guard(device);
  void* pointers[] = {&arguments};
  launch(kernel, std::clamp<int64_t>(input.chunks, 1, resident_blocks(kernel, device)), pointers, stream);
}

// The contents of a bytes object as an array.
template <typename Item>
const Item* items_of(PyObject* bytes, int64_t& count) {
  char* data = nullptr;
  Py_ssize_t size = 0;
  MAXVA_CHECK(PyBytes_AsStringAndSize(bytes, &data, &size) == 0, "bytes expected");
  count = static_cast<int64_t>(size / sizeof(Item));
  return reinterpret_cast<const Item*>(data);
}

// Runs the body of a function that Python calls.
template <typename Body>
PyObject* guarded(Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  Py_RETURN_NONE;
}

// A maxva_kernels.launch.StepLaunch.
struct ParsedStep {
  int device, laprop;
  unsigned long long stream;
  StepInput input;

  bool parse(PyObject* launched) {
    int param, grad, state, amsgrad, masters;  // of the latter each row tells; they are Triton's
    unsigned long long rows, chunk_rows, ticket, grad_scale, found_inf, grad_norm, trust_ratios, statistics, saturation,
        squares, norms;
    long long chunks;
    double max_grad_norm;
    PyObject *groups, *grads;
    if (!PyArg_ParseTuple(launched, "iKiiipppKKLKSSKKKKKKKKd", &device, &stream, &param, &grad, &state, &laprop,
                          &amsgrad, &masters, &rows, &chunk_rows, &chunks, &ticket, &groups, &grads, &grad_scale,
                          &found_inf, &grad_norm, &trust_ratios, &statistics, &saturation, &squares, &norms,
                          &max_grad_norm)) {
      return false;
    }
    input = {param,     grad,      state,        rows,       chunk_rows, chunks,  ticket, grad_scale,
             found_inf, grad_norm, trust_ratios, statistics, saturation, squares, norms,  max_grad_norm};
    input.groups = items_of<PackedGroup>(groups, input.group_count);
    input.grads = items_of<uint64_t>(grads, input.tensors);
    return true;
  }

  DType param() const { return static_cast<DType>(input.param_dtype); }
  Algorithm algorithm() const { return laprop ? Algorithm::kLaMAdam : Algorithm::kMAdam; }

  void launch(const Kernel& kernel) const {
    if (param() == DType::kDouble) {
      launch_over_chunks<StepLaunch<double>>(kernel, input, device, stream);
    } else {
      launch_over_chunks<StepLaunch<float>>(kernel, input, device, stream);
    }
  }
};

PyObject* step(PyObject*, PyObject* launched) {
  ParsedStep parsed;
  if (!parsed.parse(launched)) {
    return nullptr;
  }
  return guarded([&] {
    const DType grad = static_cast<DType>(parsed.input.grad_dtype),
                state = static_cast<DType>(parsed.input.state_dtype);
    parsed.launch(step_kernel_for(parsed.param(), grad, state, parsed.algorithm(), parsed.input.statistics != 0));
  });
}

PyObject* update_norms(PyObject*, PyObject* launched) {
  ParsedStep parsed;
  if (!parsed.parse(launched)) {
    return nullptr;
  }
  return guarded([&] {
    const bool twice = parsed.param() == DType::kDouble;
    parsed.launch(update_chunks_kernel_for(twice, parsed.algorithm()));
    parsed.launch(update_total_kernel_for(twice));
  });
}

PyObject* norm_chunks(PyObject*, PyObject* launched) {
  int device, grad, twice;
  unsigned long long stream, rows, chunk_rows, sums;
  long long chunks;
  PyObject* grads;
  if (!PyArg_ParseTuple(launched, "iKipKKLSK", &device, &stream, &grad, &twice, &rows, &chunk_rows, &chunks, &grads,
                        &sums)) {
    return nullptr;
  }
  return guarded([&] {
    NormInput input{rows, chunk_rows, chunks, sums};
    input.grads = items_of<uint64_t>(grads, input.tensors);
    const Kernel kernel = norm_chunks_kernel_for(static_cast<DType>(grad), twice != 0);
    if (twice) {
      launch_over_chunks<NormLaunch<double>>(kernel, input, device, stream);
    } else {
      launch_over_chunks<NormLaunch<float>>(kernel, input, device, stream);
    }
  });
}

PyObject* norm_total(PyObject*, PyObject* launched) {
  int device, twice;
  unsigned long long stream, sums, norm;
  long long chunks;
  if (!PyArg_ParseTuple(launched, "iKpKLK", &device, &stream, &twice, &sums, &chunks, &norm)) {
    return nullptr;
  }
  return guarded([&] {
    const DeviceGuard guard(device);
    void* pointers[] = {&sums, &chunks, &norm};
    launch(norm_total_kernel_for(twice != 0), 1, pointers, stream);
  });
}

// The newest CUDA that the driver knows, 12040 for 12.4; 0 without a driver.
int driver_version() {
  int version = 0;
  cudaDriverGetVersion(&version);
  return version;
}

PyObject* probe(PyObject*, PyObject* args) {
  int device;
  if (!PyArg_ParseTuple(args, "i", &device)) {
    return nullptr;
  }
  return guarded([&] {
    MAXVA_CHECK(driver_version() >= 12010,
                "the driver takes only 4 KB of a kernel's arguments; update it to R530 or newer");
    const DeviceGuard guard(device);
    resident_blocks(step_kernel_for(DType::kFloat, DType::kFloat, DType::kFloat, Algorithm::kMAdam, false), device);
  });
}

PyMethodDef methods[] = {
    {"step", step, METH_O, "step(launch)\n\nLaunches one step, given as a maxva_kernels.launch.StepLaunch."},
    {"update_norms", update_norms, METH_O,
     "update_norms(launch)\n\nLaunches the norms of parameters and updates, given as a "
     "maxva_kernels.launch.StepLaunch."},
    {"norm_chunks", norm_chunks, METH_O,
     "norm_chunks(launch)\n\nLaunches the sums of squares of chunks, given as a NormLaunch."},
    {"norm_total", norm_total, METH_O,
     "norm_total(launch)\n\nLaunches the root of the sum of all chunks, given as a TotalLaunch."},
    {"probe", probe, METH_VARARGS, "probe(device)\n\nRaises RuntimeError if the kernels cannot run on that device."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace maxva::cuda

PyMODINIT_FUNC PyInit__C_cuda(void) {
  PyObject* module = PyModule_Create(&maxva::cuda::definition);
  if (module != nullptr) {
    PyModule_AddIntConstant(module, "MAX_TENSORS", maxva::cuda::kMaxTensors);
    PyModule_AddIntConstant(module, "MAX_GROUPS", maxva::cuda::kMaxGroups);
    PyModule_AddIntConstant(module, "STEP_CHUNK", maxva::kStepChunk);
    PyModule_AddIntConstant(module, "NORM_CHUNK", maxva::kNormChunk);
    PyModule_AddIntConstant(module, "GRAPHS", maxva::cuda::driver_version() >= 13000);  // see launch.h
  }
  return module;
}
