// AVX-512.
#define EMBTABLES_INSTRUCTIONS avx512
#include "kernels.h"

namespace embtables {
EMBTABLES_FUNCTIONS(avx512)
}  // namespace embtables
