// csrc/cuda/arguments.cpp for Python's ctypes: fills a launch as the compiled module does, and says what its limits
// are.
#include "cuda/arguments.h"

using namespace maxva;
using namespace maxva::cuda;

extern "C" {

extern const int64_t max_tensors = kMaxTensors, max_groups = kMaxGroups, step_chunk = kStepChunk,
                     norm_chunk = kNormChunk, packed_group_bytes = sizeof(PackedGroup),
                     step_row_bytes = sizeof(StepRow), norm_row_bytes = sizeof(NormRow),
                     step_launch_bytes = sizeof(StepLaunch<float>),
                     step_launch_double_bytes = sizeof(StepLaunch<double>),
                     norm_launch_bytes = sizeof(NormLaunch<float>);

void fill_step(void* launch, bool twice, const StepInput* input) {
  twice ? fill(*static_cast<StepLaunch<double>*>(launch), *input)
        : fill(*static_cast<StepLaunch<float>*>(launch), *input);
}

void fill_norm(void* launch, bool twice, const NormInput* input) {
  twice ? fill(*static_cast<NormLaunch<double>*>(launch), *input)
        : fill(*static_cast<NormLaunch<float>*>(launch), *input);
}
}
