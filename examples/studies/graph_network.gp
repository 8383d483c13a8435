# Draws distance.png from contributions.dat of `folder`; called by graph_network.c.
set terminal pngcairo size 1100, 640 font "DejaVu Sans,12" background "#ffffff"
set output folder."/distance.png"
set encoding utf8
set minussign
blue = "#0072b2"; orange = "#c84b00"
data = folder."/contributions.dat"
set label 1 "{/:Bold=17 Labels reach farther than the network reads}" at screen 0.035, 0.95
set label 2 "Contribution of single labelled documents to the output of the subject decided for, by citations between the two.\nThe network reads words up to 2 away." \
    at screen 0.035, 0.905 tc rgb "#555555"
set label 3 "of that subject" at screen 0.86, 0.70 tc rgb blue
set label 4 "of other subjects" at screen 0.86, 0.64 tc rgb orange
set tmargin at screen 0.82; set bmargin at screen 0.13; set lmargin at screen 0.09; set rmargin at screen 0.84
set border 3 lc rgb "#555555"
set xtics nomirror out ("0: itself" 0, 1, 2, 3, 4, 5, "6 and more" 6); set ytics nomirror out
set xrange [-0.6:6.6]
set xlabel "citations between the documents"
set ylabel "contribution"
set grid y lc rgb "#e6e6e6" lt 1
unset key
set jitter over 0.5 spread 0.12
plot 0 with lines lc rgb "#cccccc", \
     data using ($2 == 0 ? $1 - 0.16 : NaN):3 with points pt 7 ps 0.6 lc rgb blue, \
     data using ($2 == 1 ? $1 + 0.16 : NaN):3 with points pt 7 ps 0.6 lc rgb orange
