# shellcheck shell=sh
# shellcheck shell=sh
# A login shell resets PATH; here it has the Python of the experiments, and files are nobody else's.
PATH=/opt/venv/bin:$PATH
umask 077
