// AVX2.
#define EMBTABLES_INSTRUCTIONS avx2
#include "kernels.h"

namespace embtables {
EMBTABLES_FUNCTIONS(avx2)
}  // namespace embtables
