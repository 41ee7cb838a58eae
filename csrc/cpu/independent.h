// For loops that a compiler may vectorise.
#pragma once

// The operands of a loop do not overlap, which its compiler need not test.
#if defined(__clang__)
#define MAXVA_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define MAXVA_INDEPENDENT _Pragma("GCC ivdep")
#endif
