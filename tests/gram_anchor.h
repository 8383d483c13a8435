/* gram_anchor.h: eight rows whose machines and measures are known to many digits. */
#ifndef GRAM_ANCHOR_H
#define GRAM_ANCHOR_H
#include "fixture.h"

enum { ANCHOR_ROWS = 8 };

/* The tangent kernel of one infinitely wide layer of ReLU, the linear kernel, and +1 and -1 as targets. */
FIXTURE void gram_anchor(double *tangent, double *linear, double *signs)
{
    static const double y[ANCHOR_ROWS] = {1, -1, 1, 1, -1, -1, 1, -1};
    const double pi = acos(-1.0);
    double x[ANCHOR_ROWS][3];
    for (int i = 0; i < ANCHOR_ROWS; i++)
        for (int j = 0; j < 3; j++)
            x[i][j] = sin(1 + 3 * i + 2 * j + 0.5 * i * j);
    for (int i = 0; i < ANCHOR_ROWS; i++)
        for (int j = 0; j < ANCHOR_ROWS; j++) {
            double xx = 0, yy = 0, xy = 0;
            for (int k = 0; k < 3; k++) {
                xx += x[i][k] * x[i][k] / 3;
                yy += x[j][k] * x[j][k] / 3;
                xy += x[i][k] * x[j][k] / 3;
            }
            const double scale = sqrt(xx * yy), u = i == j ? 1 : xy / scale, r = i == j ? 0 : sqrt(1 - u * u),
                         angle = i == j ? 0 : atan2(r, u);
            linear[i * ANCHOR_ROWS + j] = xy;
            tangent[i * ANCHOR_ROWS + j] = scale * 2 * (u * (pi - angle) + r) / pi + 2 * xy * (pi - angle) / pi;
        }
    memcpy(signs, y, sizeof y);
}
#endif
