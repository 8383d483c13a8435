# Draws classes.png from the classes_*.dat of `folder`; called by 02_digits_report.c.
set terminal pngcairo size 1400, 720 font "DejaVu Sans,12" background "#ffffff"
set output folder."/classes.png"
set encoding utf8
set minussign
# Paul Tol's muted colours, told apart by colour-blind readers, and a grey.
array colour[10] = ["#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#bbbbbb"]
bands = folder."/classes_bands.dat"
names = folder."/classes_names.dat"

# The same range for both panels.
stats bands using 21 index 0 name "up0" nooutput; stats bands using 21 index 1 name "up1" nooutput
stats bands using 22 index 0 name "low0" nooutput; stats bands using 22 index 1 name "low1" nooutput
top = 1.06 * (up0_max > up1_max ? up0_max : up1_max)
bottom = 1.06 * (low0_min < low1_min ? low0_min : low1_min)

set multiplot
set label 4 "training digits of class" at screen 0.075, 0.045
do for [k=0:9] {
    set object 1+k rectangle from screen 0.235+0.043*k, 0.033 to screen 0.249+0.043*k, 0.06 fc rgb colour[k+1] fs solid 1 noborder
    set label 10+k sprintf("%d", k) at screen 0.254+0.043*k, 0.046
}
set arrow 1 from screen 0.70, 0.046 to screen 0.73, 0.046 nohead lw 2.5 lc rgb "#000000"
set label 5 "the output itself, by forward passes" at screen 0.737, 0.046
set label 1 "{/:Bold=17 How the training digits of each class moved two outputs of one test digit}" at screen 0.035, 0.955
set label 2 sprintf("A %d, read as %d.  Sum of all contributions up to a step, stacked by the class of the training digits (64-32-32-10, %s)", label, output[1], activation) \
    at screen 0.035, 0.905 tc rgb "#555555"
set border 3 lc rgb "#555555"
set xrange [0:1.06*steps]
set yrange [bottom:top]
set xtics nomirror out 0, steps/5, steps; set ytics nomirror out
set xlabel "step of training"
set tmargin at screen 0.80; set bmargin at screen 0.17
set style fill solid 1 noborder
do for [p=0:1] {
    set lmargin at screen 0.075 + 0.475*p; set rmargin at screen 0.445 + 0.475*p
    set label 3 sprintf("{/:Bold=13 output %d}%s", output[p+1], p ? (label == output[2] ? "  (the right one)" : "  (the second)") : "  (decided for)") at graph 0, 1.045
    set ylabel p ? "" : "contribution since the start" offset -1
    unset key
    plot for [k=9:0:-1] bands index p using 1:(column(3+2*k)) with filledcurves y1=0 lc rgb colour[k+1], \
         for [k=9:0:-1] bands index p using 1:(column(4+2*k)) with filledcurves y1=0 lc rgb colour[k+1], \
         for [k=9:0:-1] bands index p using 1:(column(3+2*k)) with lines lc rgb "#ffffff" lw 0.8, \
         for [k=9:0:-1] bands index p using 1:(column(4+2*k)) with lines lc rgb "#ffffff" lw 0.8, \
         0 with lines lc rgb "#000000" lw 1, \
         bands index p using 1:2 with lines lc rgb "#ffffff" lw 5, \
         bands index p using 1:2 with lines lc rgb "#000000" lw 2.5, \
         names index p using ($1*1.015):($4 > 0.03*(top-bottom) ? $2 : NaN):(sprintf("%d", $3)) with labels left
    unset label; unset object; unset arrow
}
# The test digit itself.
unset object; unset label; unset tics; unset xlabel; unset ylabel; unset colorbox
set border 15 lc rgb "#222222"
set lmargin at screen 0.905; set rmargin at screen 0.965; set tmargin at screen 0.975; set bmargin at screen 0.858
set xrange [-0.7:7.7]; set yrange [7.7:-0.7]
set palette defined (0 "#ffffff", 1 "#1a1a1a"); set cbrange [0:1]
plot folder."/classes_pixels.dat" matrix with image pixels
unset multiplot
set label 4 "training digits of class" at screen 0.075, 0.045
do for [k=0:9] {
    set object 1+k rectangle from screen 0.235+0.043*k, 0.033 to screen 0.249+0.043*k, 0.06 fc rgb colour[k+1] fs solid 1 noborder
    set label 10+k sprintf("%d", k) at screen 0.254+0.043*k, 0.046
}
set arrow 1 from screen 0.70, 0.046 to screen 0.73, 0.046 nohead lw 2.5 lc rgb "#000000"
set label 5 "the output itself, by forward passes" at screen 0.737, 0.046
