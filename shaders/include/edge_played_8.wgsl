// Matrices of 8 x 8 without cooperative matrices.
#include "include/played.wgsl"

const EDGE: u32 = 8u;
