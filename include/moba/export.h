// Symbol visibility: everything is hidden but what carries MOBA_EXPORT.
#pragma once

#if defined(MOBA_STATIC)
#define MOBA_EXPORT
#elif defined(_WIN32)
#if defined(MOBA_BUILDING)
#define MOBA_EXPORT __declspec(dllexport)
#else
#define MOBA_EXPORT __declspec(dllimport)
#endif
#else
#define MOBA_EXPORT __attribute__((visibility("default")))
#endif
