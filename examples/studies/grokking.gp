# Draws grokking.png from accuracy.dat and curves.dat of `folder`; called by grokking.c.
set terminal pngcairo size 1200, 1180 font "DejaVu Sans,12" background "#ffffff"
set output folder."/grokking.png"
set encoding utf8
set minussign
# Paul Tol's muted colours, told apart by colour-blind readers.
array colour[7] = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#cc6677", "#882255"]
curves = folder."/curves.dat"
blue = "#0072b2"; orange = "#c84b00"; black = "#000000"; grey = "#777777"
set multiplot
set label 1 sprintf("{/:Bold=17 Learned by heart, then by rule: addition modulo %d}", p) at screen 0.035, 0.97
set label 2 sprintf("One transformer layer, AdamW, %d training pairs. Below: the margin of the right answer on unseen pairs, decomposed exactly", pairs) \
    at screen 0.035, 0.943 tc rgb "#555555"
set border 3 lc rgb "#555555"
set xrange [0:steps]
set xtics nomirror out; set ytics nomirror out
set lmargin at screen 0.085; set rmargin at screen 0.76
unset key
set tmargin at screen 0.90; set bmargin at screen 0.70
set ylabel "answered rightly, %" offset 0
set yrange [0:104]
set label 11 "pairs learned from" at graph 1.03, 0.95 tc rgb black
set label 12 "unseen pairs" at graph 1.03, 0.80 tc rgb blue
plot folder."/accuracy.dat" using 1:2 with lines lw 2.5 lc rgb black, "" using 1:3 with lines lw 2.5 lc rgb blue
unset label
# As many digits for small numbers as for large ones, of both signs.
set nonlinear y via asinh(y) inverse sinh(y)
set ytics ("-10000" -10000, "-1000" -1000, "-100" -100, "-10" -10, "-1" -1, 0, "1" 1, "10" 10, "100" 100, "1000" 1000, "10000" 10000)
set autoscale y
set tmargin at screen 0.64; set bmargin at screen 0.38
set ylabel "sum of contributions"
set label 11 "training pairs" at graph 1.03, 0.95
set label 12 "with the same answer" at graph 1.03, 0.87 tc rgb blue
set label 13 "with other answers" at graph 1.03, 0.79 tc rgb orange
set label 14 "weight decay" at graph 1.03, 0.66 tc rgb grey
set label 15 "= the margin itself," at graph 1.03, 0.53 tc rgb black
set label 16 "   by forward passes" at graph 1.03, 0.45 tc rgb black
plot 0 with lines lc rgb "#cccccc", curves using 1:3 with lines lw 2.5 lc rgb blue, "" using 1:4 with lines lw 2.5 lc rgb orange, \
     "" using 1:5 with lines lw 2.5 lc rgb grey, "" using 1:2 with lines lw 2.5 lc rgb black
unset label
set tmargin at screen 0.32; set bmargin at screen 0.06
set xlabel "step of training"
set ylabel "the same of training pairs, by layer"
set label 11 "through the weights of" at graph 1.03, 0.95
do for [l=1:7] { set label 11+l layer[l] at graph 1.03, 0.95-0.09*l tc rgb colour[l] }
plot 0 with lines lc rgb "#cccccc", for [l=1:7] curves using 1:(column(5+l)) with lines lw 2.5 lc rgb colour[l]
unset multiplot
