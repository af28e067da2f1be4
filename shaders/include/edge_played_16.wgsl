// Matrices of 16 x 16 without cooperative matrices.
#include "include/played.wgsl"

const EDGE: u32 = 16u;
