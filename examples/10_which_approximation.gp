# Draws rules.png from rules.dat of `folder`; called by 10_which_approximation.c.
set terminal pngcairo size 1400, 640 font "DejaVu Sans,12" background "#ffffff"
set output folder."/rules.png"
set encoding utf8
set minussign
data = folder."/rules.dat"
array name[3] = ["tanh", "relu", "tanh, steps of half the size"]
array colour[3] = ["#0072b2", "#c84b00", "#009e73"]
array mark[3] = [7, 5, 6]
set border 3 lc rgb "#555555"
set xrange [-0.6:9.6]
set xtics nomirror out rotate by 35 right noenhanced ("left" 0, "segment" 1, "path integral" 2, "trapezoid" 3, "midpoint" 4, "checkpoints" 5, "linear start" 6, "linear end" 7, "telescoping" 8, "exact" 9)
set ytics nomirror out
set grid y lc rgb "#e6e6e6" lt 1
set tmargin at screen 0.80; set bmargin at screen 0.27
unset key
set multiplot
set label 1 "{/:Bold=17 What each rule leaves of the outputs' change, and how it orders the training digits}" at screen 0.035, 0.955
set label 2 "16 test digits over 300 training digits, 10 outputs (64-12-10, full batches)" at screen 0.035, 0.905 tc rgb "#555555"
do for [k=0:2] {
    set label 10+k name[k+1] at screen 0.08+0.09*k, 0.05 point pt mark[k+1] ps 1.5 lc rgb colour[k+1] lw 2 offset 1.4, 0
}
set label 13 "small: the median of all rows and outputs; large: the largest" at screen 0.49, 0.05 tc rgb "#555555"
set lmargin at screen 0.075; set rmargin at screen 0.49
set logscale y 10
set format y "10^{%L}"
set yrange [1e-16:100]
set label 3 "{/:Bold=13 residual}" at graph 0, 1.045
plot for [k=0:2] data index k using ($0+0.18*(k-1)):2:3 with yerrorbars lc rgb colour[k+1] lw 1 pt 0, \
     for [k=0:2] data index k using ($0+0.18*(k-1)):3:2:3 with yerrorbars lc rgb colour[k+1] lw 1.5 pt 0, \
     for [k=0:2] data index k using ($0+0.18*(k-1)):3 with points lc rgb colour[k+1] pt mark[k+1] ps 0.7, \
     for [k=0:2] data index k using ($0+0.18*(k-1)):2 with points lc rgb colour[k+1] pt mark[k+1] ps 1.5
unset label
unset logscale y
set format y "%.2f"
set yrange [0.8:1.005]
set lmargin at screen 0.56; set rmargin at screen 0.975
set label 3 "{/:Bold=13 rank correlation of the contributions with the exact ones}" at graph 0, 1.045
plot for [k=0:2] data index k using ($0+0.18*(k-1)):4 with points lc rgb colour[k+1] pt mark[k+1] ps 1.5
unset multiplot
