// The command line of the program: its commands, their options and their help.
#pragma once

namespace moba::cli {

// Parses the arguments and runs the command they name. Returns the exit code: 0 when done, 1 when the command refused
// its input or failed, 2 when the command line is wrong; the latter two after one line on standard error.
int run_command_line(int argc, const char* const* argv);

}  // namespace moba::cli
