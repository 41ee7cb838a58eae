// Errors for the user: raised as RuntimeError in Python, without the place in our source that torch's macro puts first.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace maxva {

template <typename... Parts>
std::string joined(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

}  // namespace maxva

// The parts of the message are evaluated only where `condition` fails.
#define MAXVA_CHECK(condition, ...)                                      \
  do {                                                                   \
    if (!(condition)) {                                                  \
      throw std::runtime_error(::maxva::joined("maxva: ", __VA_ARGS__)); \
    }                                                                    \
  } while (false)
