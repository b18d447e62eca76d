// Mixture of Block Attention: the whole public face in one include.
#pragma once

#include "moba/attention.h"
#include "moba/cache.h"
#include "moba/config.h"
#include "moba/error.h"
#include "moba/info.h"
#include "moba/plan.h"
#include "moba/tensor.h"
