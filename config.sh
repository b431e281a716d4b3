# shellcheck shell=bash disable=SC2034
# Everything that an administrator sets, once. Plain shell: the scripts source it, and ./invoke reads it through the shell.

# --- The machines ---------------------------------------------------------------------------------------------------
# Addresses of the workers, separated by spaces. Empty: simulated machines on this one, to try it all on a laptop.
# An address is reached by SSH; it may be the head's own, which then is a worker too.
WORKER_ADDRS=""
# The address under which the workers reach this machine, the head. Empty: found by itself.
HEAD_ADDR=""
# Who logs in on the workers (root, or a user with sudo that asks for no password), and with which private key.
# No key: the ones that ssh finds, or its agent.
SSH_USER="root"
SSH_KEY=""

# --- Simulated machines (when WORKER_ADDRS is empty) ----------------------------------------------------------------
# How many, and the CPUs and megabytes of memory that each has for Slurm. 0: this machine's, shared out.
# More CPUs than there are let wide jobs be tried; measurements are void then.
LOCAL_WORKERS=2
LOCAL_WORKER_CPUS=0
LOCAL_WORKER_MEMORY_MB=0

# --- Home directories -----------------------------------------------------------------------------------------------
# Where they are on the head. In the cluster's containers this is /home; the machine's own /home is never touched.
# A directory for them alone, two levels deep or more.
HOME_ROOT="/srv/cfiddle-cluster/home"
# bind (simulated machines), nfs (real ones), or empty: chosen by itself.
# With HOME_STORAGE=nfs and HOME_SERVER=ADDRESS an NFS server that exists already is used; HOME_ROOT is its export then.
HOME_STORAGE=""
HOME_SERVER=""

# --- What people reach ----------------------------------------------------------------------------------------------
JUPYTER_PORT=8888
# A port of the head for SSH to the users' node, with a key that the user has put into ~/.ssh/authorized_keys there. Empty: none.
SSH_PORT=""

# --- Measurements that can be trusted -------------------------------------------------------------------------------
# A worker that is slower than others of its CPU model by more than so many percent takes no jobs until it no longer is.
CALIBRATION_LIMIT=10
# What ./invoke tune may set on real workers: governor (performance), boost (off), smt (off), swap (off), and counters
# (kernel.perf_event_paranoid=2: users may count what their own programs do).
TUNE="governor boost smt swap counters"

# --- Images ---------------------------------------------------------------------------------------------------------
# Empty: through the cluster's own registry on the head. Otherwise through this account at Docker Hub, or, as HOST:PORT/NAME,
# through an account at another registry. Its password or access token is taken from DOCKERHUB_TOKEN, once.
DOCKERHUB_USERNAME=""
REGISTRY_PORT=5000
# The registry of images that users commit (ddocker commit), on the head too.
USER_REGISTRY_PORT=5001
# The release of Debian that all images are made of.
DEBIAN_RELEASE="trixie"
# The day that its packages are of, as 2026-11-26. With another one than before, ./invoke upgrade makes all images anew, with all
# of Debian's security updates, and rolls them out. Empty: the day when they were first made.
PACKAGES_OF=""
