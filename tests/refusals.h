// What every refusal is worded like.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <string>

namespace moba::test {

// One line that holds the name of the argument, and not as a part of a longer name, and what is allowed.
inline ::testing::AssertionResult refuses(const std::string& message, const std::string& argument) {
  const auto letter = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; };
  bool named = false;
  for (auto at = message.find(argument); at != message.npos; at = message.find(argument, at + 1)) {
    const auto end = at + argument.size();
    named = named || ((at == 0 || message[at - 1] == ' ') && (end == message.size() || !letter(message[end])));
  }
  if (named && message.find("; allowed: ") != message.npos && message.find('\n') == message.npos) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "not a refusal of " << argument << ": " << message;
}

}  // namespace moba::test
