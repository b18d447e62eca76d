// The words of the command line for the library's enumerations.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include "commands.h"
#include "moba/error.h"
#include "moba/plan.h"
#include "text.h"

namespace moba::cli {

template <class Enum>
struct Word {
  std::string_view text;
  Enum value;
};

inline constexpr std::array kDTypes{Word<DType>{"f32", DType::f32}, Word<DType>{"f16", DType::f16},
                                    Word<DType>{"bf16", DType::bf16}};
inline constexpr std::array kBackends{Word<Backend>{"cpu", Backend::cpu},
                                      Word<Backend>{"reference", Backend::reference},
                                      Word<Backend>{"cuda", Backend::cuda}};
inline constexpr std::array kCudaKernels{Word<std::string_view>{"sm90", "sm90"},
                                         Word<std::string_view>{"portable", "portable"}};
inline constexpr std::array kBf16Products{Word<Bf16Products>{"auto", Bf16Products::automatic},
                                          Word<Bf16Products>{"widen", Bf16Products::widen},
                                          Word<Bf16Products>{"dot", Bf16Products::dot}};
inline constexpr std::array kGradientChecks{Word<CheckGradients>{"auto", CheckGradients::automatic},
                                            Word<CheckGradients>{"always", CheckGradients::always},
                                            Word<CheckGradients>{"never", CheckGradients::never}};
inline constexpr std::array kRopeStyles{Word<RopeStyle>{"half-split", RopeStyle::half_split},
                                        Word<RopeStyle>{"interleaved", RopeStyle::interleaved}};
inline constexpr std::array kRopeScalings{
    Word<RopeScaling>{"none", RopeScaling::none}, Word<RopeScaling>{"linear", RopeScaling::linear},
    Word<RopeScaling>{"llama3", RopeScaling::llama3}, Word<RopeScaling>{"yarn", RopeScaling::yarn}};

// "f32, f16, bf16"
template <class Words>
std::string list_words(const Words& words, const char* separator = ", ") {
  std::string text;
  for (const auto& word : words) text += (text.empty() ? "" : separator) + std::string(word.text);
  return text;
}

// The value that `text` names; any other text is a moba::Error that starts with `what`.
template <class Words>
auto parse_word(std::string_view what, std::string_view text, const Words& words) {
  for (const auto& word : words) {
    if (word.text == text) return word.value;
  }
  throw Error(std::string(what) + ": is '" + printable(text) + "'; allowed: " + list_words(words));
}

template <class Words, class Enum>
std::string_view word_of(Enum value, const Words& words) {
  for (const auto& word : words) {
    if (word.value == value) return word.text;
  }
  return "?";
}

}  // namespace moba::cli
