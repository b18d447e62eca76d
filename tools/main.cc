// The program moba.
#include "command_line.h"

int main(int argc, char** argv) { return moba::cli::run_command_line(argc, argv); }
