# Draws contact_sheet.png from the contact_*.dat of `folder`; called by 02_digits_report.c and 05_convolution.c.
# Coordinates are pixels of the digits, 10 of the picture's each.
scale = 10
margin_left = 6; margin_right = 34; top = 12; bottom = 5
width = sheet_width + margin_left + margin_right
height = sheet_height + top + bottom
set terminal pngcairo size scale*width, scale*height font "DejaVu Sans,10.5" background "#ffffff"
set output folder."/contact_sheet.png"
set encoding utf8
set lmargin at screen 0; set rmargin at screen 1; set tmargin at screen 1; set bmargin at screen 0
set xrange [-margin_left-0.5 : sheet_width+margin_right-0.5]
set yrange [sheet_height+bottom-0.5 : -top-0.5]
unset tics; unset border; unset key; unset colorbox
set palette defined (0 "#ffffff", 1 "#1a1a1a")
set cbrange [0:1]

blue = "#0072b2"; orange = "#c84b00"
set label 1 "{/:Bold=17 Which training digits speak for a decision, and which against it}" at -4.6, -9.3
set label 2 "Contribution of single training digits to the output of the class decided for, ".subtitle \
    at -4.6, -6.6 tc rgb "#555555"
set label 3 "{/:Bold=12 test digit}" at 3.5, -2.8 center
set label 4 "{/:Bold=12 strongest for}" at for_x + group_width/2.0 - 0.5, -2.8 center tc rgb blue
set label 5 "{/:Bold=12 strongest against}" at against_x + group_width/2.0 - 0.5, -2.8 center tc rgb orange
set label 6 "{/:Bold=12 the whole account}" at sheet_width + 1, -2.8 left
set label 8 "{/:Bold=11 right decisions}" at -4.6, right_rows*pitch_y/2.0 - 2 center rotate by 90
set label 9 "{/:Bold=11 wrong decisions}" at -4.6, (right_rows + wrong_rows/2.0)*pitch_y - 2 center rotate by 90
if (right_rows == 0) { unset label 8 }
if (wrong_rows == 0) { unset label 9 }
set label 7 "Captions: label of the training digit, and its contribution.  Account: before training + for + against = output, but for the closure, which is measured." \
    at -4.6, sheet_height + 1.6 tc rgb "#555555"

plot folder."/contact_pixels.dat" matrix with image pixels, \
     folder."/contact_frames.dat" using 1:2:3 with lines lc rgb variable lw 1.6, \
     folder."/contact_center.dat" using 1:2:4:3 with labels center tc rgb variable, \
     folder."/contact_left.dat" using 1:2:4:3 with labels left tc rgb variable, \
     folder."/contact_right.dat" using 1:2:4:3 with labels right tc rgb variable
