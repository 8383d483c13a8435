# Draws errors.png from errors.dat of `folder`; called by 03_quadrature.c.
set terminal pngcairo size 1400, 760 font "DejaVu Sans,12" background "#ffffff"
set output folder."/errors.png"
set encoding utf8
data = folder."/errors.dat"
array name[4] = ["left", "midpoint", "trapezoid", "Gauss"]
array colour[4] = ["#777777", "#0072b2", "#009e73", "#c84b00"]
array mark[4] = [4, 6, 8, 12]
set logscale xy 2
set logscale y 10
set xrange [0.85:400]
set yrange [3e-17:30]
set format y "10^{%L}"
set format x "%.0f"
set border 3 lc rgb "#555555"
set xtics nomirror out; set ytics nomirror out 1e-15, 1000, 1
unset mytics; unset mxtics
set grid y lc rgb "#e6e6e6" lt 1
set xlabel "nodes per step"
set tmargin at screen 0.80; set bmargin at screen 0.19
set multiplot
set label 1 "{/:Bold=17 Rules with fixed nodes stumble over the kinks of ReLU; a rule that finds the kinks is exact}" at screen 0.035, 0.955
set label 2 "Worst error of a decomposition, against the quadrature nodes for each step of training (64-32-32-10 on digits)" at screen 0.035, 0.905 tc rgb "#555555"
do for [k=0:3] {
    set arrow 1+k from screen 0.078+0.11*k, 0.06 to screen 0.108+0.11*k, 0.06 nohead lw 2.2 lc rgb colour[k+1]
    set label 10+k name[k+1] at screen 0.093+0.11*k, 0.06 point pt mark[k+1] ps 1.2 lc rgb colour[k+1] lw 2 offset 2.2, 0
}
set label 14 "pathkernel" at screen 0.535, 0.06 point pt 7 ps 2.2 lc rgb "#000000" offset 1.4, 0
set arrow 6 from screen 0.655, 0.06 to screen 0.69, 0.06 nohead lw 2.2 lc rgb "#555555"
set label 16 "closure" at screen 0.698, 0.063
set arrow 7 from screen 0.785, 0.06 to screen 0.82, 0.06 nohead lw 1.8 dt (4,4) lc rgb "#555555"
set label 17 "single contributions" at screen 0.828, 0.063
do for [p=0:1] {
    set lmargin at screen 0.075 + 0.475*p; set rmargin at screen 0.48 + 0.475*p
    set label 3 (p ? "{/:Bold=13 ReLU}" : "{/:Bold=13 tanh}") at graph 0, 1.045
    set ylabel p ? "" : "worst relative error" offset 0
    unset key
    stats data index 5*p+4 using 1 nooutput name "nodes"
    stats data index 5*p+4 using 2 nooutput name "closure"
    set label 5 sprintf(p ? "split at the kinks,\n%.1f nodes" : "automatic, %.1f nodes", nodes_mean) at nodes_mean*1.25, closure_mean*(p ? 1.7 : 30)
    plot for [k=0:3] data index 5*p+k using 1:2 with linespoints lc rgb colour[k+1] lw 2.2 pt mark[k+1] ps 1.2, \
         for [k=0:3] data index 5*p+k using 1:3 with lines lc rgb colour[k+1] lw 1.8 dt (4,4), \
         data index 5*p+4 using 1:2 with points pt 7 ps 2.6 lc rgb "#000000"
    unset label; unset arrow
}
unset multiplot
