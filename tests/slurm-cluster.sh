#!/usr/bin/env bash
# A throw-away, real Slurm cluster of four virtual nodes on one host, for the tests.
#
#   slurm-cluster.sh up              install what is missing (as root), configure, start, wait
#   slurm-cluster.sh down [--purge]  cancel jobs, stop what it started, by pid; delete its folder
#   slurm-cluster.sh status          what runs; 0 only if the cluster answers
#   slurm-cluster.sh env             what a client needs (eval it)
#   slurm-cluster.sh start DAEMON    slurmdbd or slurmctld again, after the test shot it
#   slurm-cluster.sh stop DAEMON     and its end, by SIGKILL
#   slurm-cluster.sh node-kill N     kill -9 the slurmd of a node; its jobs go on (split brain)
#   slurm-cluster.sh node-crash N    kill -9 the slurmd, its steps and every process of its jobs
#   slurm-cluster.sh node-start N    start the slurmd of a node again
#
# Only installing needs root. All settings are optional: LSWEEP_SLURM_HOME, _NODES, _CPUS, _MEM (MiB),
# _PORT, _PREFIX (of node names), _PROCTRACK (cgroup|linuxproc), _MEMLIMIT (1|0), _MAX_ARRAY,
# _CRED_EXPIRE, _KILL_WAIT, _SLURMD_TIMEOUT, _GRACE. Two clusters at once: another HOME and PREFIX
# (root's cgroups are named after nodes), and PORTs 1000 apart. Nothing is written outside HOME, apart
# from what apt itself does; keep it short, unix sockets live in it. Clients find it by SLURM_CONF.
set -euo pipefail

H=${LSWEEP_SLURM_HOME:-/var/tmp/lsweep-slurm}
NODES=${LSWEEP_SLURM_NODES:-4}          # virtual nodes, all on this host
CPUS=${LSWEEP_SLURM_CPUS:-4}            # CPUs each of them claims (oversubscribed)
MEM=${LSWEEP_SLURM_MEM:-8192}           # MiB each of them claims
PORT=${LSWEEP_SLURM_PORT:-17000}        # base: +0 ctld, +1 dbd, +11.. slurmds, +100..+399 srun
N=${LSWEEP_SLURM_PREFIX:-n}             # nodes are called n1, n2, ...
CTLD_PORT=$((PORT)); DBD_PORT=$((PORT + 1)); SRUN_LO=$((PORT + 100)); SRUN_HI=$((PORT + 399))
ME=$(id -un)
# slurmctld compares the short name in SlurmctldHost with gethostname().
HOST=$(cat /proc/sys/kernel/hostname); HOST=${HOST%%.*}
# No(Ctld)InAddrAny binds daemons and srun to whatever gethostname() resolves to, so that is how to
# listen on loopback only - if the host name resolves to loopback (Debian: /etc/hosts). Where it
# resolves to something else (docker) or to nothing, slurm can only listen on 0.0.0.0.
ADDR=$(getent ahostsv4 "$(cat /proc/sys/kernel/hostname)" 2>/dev/null | awk 'NR == 1 {print $1}') || true
case $ADDR in
  127.*) COMM="CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" DBDCOMM="CommunicationParameters=NoInAddrAny" ;;
  *) ADDR=127.0.0.1 COMM="# host name does not resolve to loopback: the ports are open on every interface" DBDCOMM= ;;
esac
PKGS="slurmctld slurmd slurmdbd slurm-client slurm-wlm-basic-plugins slurm-wlm-mysql-plugin
      munge mariadb-server-core mariadb-client-core libpmix2 libpmi2-0"
export PATH="$PATH:/usr/sbin:/sbin"
export SLURM_CONF=$H/etc/slurm.conf
export MYSQL_UNIX_PORT=$H/run/mysql.sock
# A daemon must not inherit the caller's environment: batch jobs submitted with --export=NONE, and
# everything slurmd forks, would see it.
CLEAN=(env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 HOME="$H"
       SLURM_CONF="$SLURM_CONF" MYSQL_UNIX_PORT="$MYSQL_UNIX_PORT")

# proctrack/cgroup (v1 freezer, writable, root) catches every descendant of a job, and the v1 memory
# controller gives OUT_OF_MEMORY.  linuxproc, the fallback, follows the ppid chain: a process whose
# parent was shot is re-parented to pid 1 and outlives its job.
CG=/sys/fs/cgroup
PROCTRACK=${LSWEEP_SLURM_PROCTRACK:-}
if [ -z "$PROCTRACK" ]; then
  if [ "$(id -u)" = 0 ] && [ -w $CG/freezer/cgroup.procs ]; then PROCTRACK=cgroup; else PROCTRACK=linuxproc; fi
fi
TASKPLUGIN=task/none
if [ "$PROCTRACK" = cgroup ] && [ -w $CG/memory/cgroup.procs ] && [ "${LSWEEP_SLURM_MEMLIMIT:-1}" = 1 ]; then TASKPLUGIN=task/cgroup; fi

log() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
cannot() { log "$*"; exit 77; }         # Slurm cannot be had here
die() { log "error: $*"; exit 1; }

# ---- pids ------------------------------------------------------------------------------------
# A pid file counts only while /proc/PID/exe is still the program we started (pid reuse).
alive() {   # alive NAME EXE-BASENAME  -> prints the pid
  local p e
  [ -s "$H/run/$1.pid" ] || return 1
  p=$(tr -dc 0-9 2>/dev/null <"$H/run/$1.pid") || return 1
  [ -n "$p" ] && e=$(readlink "/proc/$p/exe" 2>/dev/null) || return 1
  e=${e% (deleted)}
  e=${e##*/}; [ "${e%-wlm}" = "$2" ] && [ "$(awk '{print $3}' "/proc/$p/stat" 2>/dev/null)" != Z ] && echo "$p"
}
stop() {    # stop NAME EXE [SECONDS]
  local p i n=${3:-10}
  p=$(alive "$1" "$2") || { rm -f "$H/run/$1.pid"; return 0; }
  kill -TERM "$p" 2>/dev/null || true
  for ((i = 0; i < n * 10; i++)); do alive "$1" "$2" >/dev/null || break; sleep 0.1; done
  if alive "$1" "$2" >/dev/null; then log "$1 ($p) ignores TERM, KILL"; kill -KILL "$p" || true; sleep 0.2; fi
  rm -f "$H/run/$1.pid"
}
wait_for() { # wait_for SECONDS WHAT COMMAND...
  local n=$1 what=$2 i; shift 2
  for ((i = 0; i < n * 10; i++)); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
  die "timed out after ${n}s waiting for $what (logs: $H/log)"
}

# ---- install ---------------------------------------------------------------------------------
# Debian's mpi_pmix plugin dlopens the *development* name of libpmix, which only libpmix-dev has
# (and that pulls in m4, autoconf ...): without this link "srun --mpi=pmix" does not exist.
PMIXLIB=/usr/lib/$(uname -m)-linux-gnu/pmix2/lib
missing() { local p; for p in $PKGS; do dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'ok installed' || echo "$p"; done; }
do_install() {
  local m; m=$(missing)
  if [ -z "$m" ]; then pmix_link; return 0; fi
  [ "$(id -u)" = 0 ] || cannot "not root, and packages are missing: ${m//$'\n'/ }"
  command -v apt-get >/dev/null || cannot "no apt-get, and packages are missing: ${m//$'\n'/ }"
  log "apt-get install:" $m
  local pol= lg; lg=$(mktemp)
  if [ ! -e /usr/sbin/policy-rc.d ]; then      # keep apt from starting its own daemons
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; pol=1
  fi
  ( export DEBIAN_FRONTEND=noninteractive
    apt-get update && apt-get install -y --no-install-recommends $m ) >"$lg" 2>&1 \
    || { tail -20 "$lg" >&2; [ -z "$pol" ] || rm -f /usr/sbin/policy-rc.d; cannot "apt-get failed"; }
  rm -f "$lg"; [ -z "$pol" ] || rm -f /usr/sbin/policy-rc.d
  pmix_link
}
pmix_link() { [ -e "$PMIXLIB/libpmix.so" ] || ln -s libpmix.so.2 "$PMIXLIB/libpmix.so" 2>/dev/null || true; }

# ---- configuration ---------------------------------------------------------------------------
write_conf() {
  # 755 all the way down: other users' clients (and munge's path check) must reach the socket.
  umask 022; mkdir -p "$H"/{etc,run,log,spool,ctld,jobs}
  chmod 755 "$H" "$H"/{etc,run,log,spool,ctld}
  rm -f "$H/etc/cgroup.conf"
  if [ "$PROCTRACK" = cgroup ]; then
    printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=%s\nCgroupAutomount=no\nConstrainRAMSpace=%s\nConstrainCores=no\nConstrainDevices=no\n' \
      "$CG" "$([ "$TASKPLUGIN" = task/none ] && echo no || echo yes)" >"$H/etc/cgroup.conf"
  fi
  # Two GPUs a node that are none: Slurm deals them out, nothing can compute on them.
  printf 'Name=gpu File=/dev/%s\n' null zero >"$H/etc/gres.conf"
  [ -s "$H/etc/munge.key" ] || (umask 077; dd if=/dev/urandom of="$H/etc/munge.key" bs=128 count=1 status=none)
  chmod 400 "$H/etc/munge.key"
  local i
  {
    cat <<CONF
ClusterName=lsweep
SlurmctldHost=$HOST($ADDR)
SlurmctldPort=$CTLD_PORT
SrunPortRange=$SRUN_LO-$SRUN_HI
$COMM
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
CredType=cred/munge
# cred_expire: a requeued job stays PENDING (BeginTime) until its old credential has expired,
# 120 s by default. 5 is the least slurm accepts ("invalid" below that).
AuthInfo=socket=$H/run/munge.sock,cred_expire=${LSWEEP_SLURM_CRED_EXPIRE:-5}
StateSaveLocation=$H/ctld
SlurmctldPidFile=$H/run/slurmctld.pid
SlurmctldLogFile=$H/log/slurmctld.log
SlurmdPidFile=$H/run/slurmd-%n.pid
SlurmdLogFile=$H/log/slurmd-%n.log
SlurmdSpoolDir=$H/spool/%n
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
ProctrackType=proctrack/$PROCTRACK
TaskPlugin=$TASKPLUGIN
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=$((MEM / CPUS))
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MaxArraySize=${LSWEEP_SLURM_MAX_ARRAY:-10001}
MaxJobCount=20000
GresTypes=gpu
# quick turn-around
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,bf_continue,preempt_send_user_signal
SlurmctldTimeout=30
SlurmdTimeout=${LSWEEP_SLURM_SLURMD_TIMEOUT:-10}
MessageTimeout=10
KillWait=${LSWEEP_SLURM_KILL_WAIT:-3}
CompleteWait=0
InactiveLimit=0
WaitTime=0
OverTimeLimit=0
UnkillableStepTimeout=30
MinJobAge=300
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$ADDR
AccountingStoragePort=$DBD_PORT
# the munge socket for the slurmdbd connection is a separate setting
AccountingStoragePass=$H/run/munge.sock
AccountingStoreFlags=job_comment,job_script
CONF
    for ((i = 1; i <= NODES; i++)); do
      echo "NodeName=$N$i NodeHostname=$HOST NodeAddr=$ADDR Port=$((PORT + 10 + i)) CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM Gres=gpu:2 State=UNKNOWN"
      mkdir -p "$H/spool/$N$i"
    done
    # a job in "high" preempts (requeues) jobs in "low": first their --signal signal, then, GraceTime later, the kill
    local all="Nodes=$N[1-$NODES] MaxTime=1-00:00:00 DefaultTime=00:10:00 State=UP OverSubscribe=NO"
    echo "PartitionName=batch $all Default=YES PriorityTier=5 PreemptMode=OFF"
    echo "PartitionName=low $all PriorityTier=1 PreemptMode=REQUEUE GraceTime=${LSWEEP_SLURM_GRACE:-10}"
    echo "PartitionName=high $all PriorityTier=10 PreemptMode=OFF"
  } >"$H/etc/slurm.conf.new"
  cmp -s "$H/etc/slurm.conf.new" "$H/etc/slurm.conf" || cp "$H/etc/slurm.conf.new" "$H/etc/slurm.conf"
  rm -f "$H/etc/slurm.conf.new"; chmod 644 "$H/etc/slurm.conf"
  cat >"$H/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$H/run/munge.sock
DbdHost=localhost
DbdAddr=$ADDR
DbdPort=$DBD_PORT
$DBDCOMM
SlurmUser=$ME
PidFile=$H/run/slurmdbd.pid
LogFile=$H/log/slurmdbd.log
DebugLevel=info
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$ME
StorageLoc=slurm_acct
CommitDelay=0
CONF
  chmod 600 "$H/etc/slurmdbd.conf"
}

# ---- daemons ---------------------------------------------------------------------------------
q() { mariadb --no-defaults -S "$MYSQL_UNIX_PORT" -u "$ME" -e "$1"; }
start_munge() {
  alive munged munged >/dev/null && return 0
  rm -f "$H/run/munge.sock"* "$H/run/munged.pid"
  # --force: a 0700 or foreign-owned parent directory (pytest's tmp_path) is a warning, not an error
  "${CLEAN[@]}" /usr/sbin/munged --force --key-file="$H/etc/munge.key" --socket="$H/run/munge.sock" \
    --pid-file="$H/run/munged.pid" --log-file="$H/log/munged.log" --seed-file="$H/run/munged.seed" --num-threads=2 \
    </dev/null >>"$H/log/munged.err" 2>&1 || { cat "$H/log/munged.err" >&2; die munged; }
  wait_for 10 munged sh -c "munge -S '$H/run/munge.sock' -n | unmunge -S '$H/run/munge.sock'"
}
start_mysql() {
  alive mariadbd mariadbd >/dev/null && return 0
  rm -f "$H/run/mysql.sock" "$H/run/mariadbd.pid"
  if [ ! -d "$H/mysql/mysql" ]; then
    rm -rf "$H/mysql"
    mariadb-install-db --no-defaults --datadir="$H/mysql" --user="$ME" --auth-root-authentication-method=socket \
      --auth-root-socket-user="$ME" --skip-test-db --skip-name-resolve >"$H/log/mariadb-install.log" 2>&1 \
      || { tail "$H/log/mariadb-install.log" >&2; die mariadb-install-db; }
  fi
  # no TCP at all: unix socket only
  "${CLEAN[@]}" setsid /usr/sbin/mariadbd --no-defaults --user="$ME" --datadir="$H/mysql" --socket="$H/run/mysql.sock" \
    --pid-file="$H/run/mariadbd.pid" --log-error="$H/log/mariadbd.log" --skip-networking --skip-log-bin \
    --innodb-buffer-pool-size=64M --innodb-log-file-size=64M --innodb-lock-wait-timeout=900 \
    --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF --character-set-server=utf8mb4 \
    </dev/null >/dev/null 2>&1 &
  wait_for 30 mariadbd q 'select 1'
}
start_dbd() {
  alive slurmdbd slurmdbd >/dev/null && return 0
  q 'create database if not exists slurm_acct'
  (cd "$H/log" && SLURM_CONF="$H/etc/slurm.conf" "${CLEAN[@]}" /usr/sbin/slurmdbd)
  wait_for 30 slurmdbd sacctmgr -n -i list cluster
}
start_ctld() {
  alive slurmctld slurmctld >/dev/null && return 0
  # the cluster must exist in the database before slurmctld registers
  sacctmgr -n -P list cluster format=cluster | grep -qx lsweep || sacctmgr -i -Q add cluster lsweep >/dev/null
  (cd "$H/log" && "${CLEAN[@]}" /usr/sbin/slurmctld -f "$SLURM_CONF")
  wait_for 30 slurmctld sh -c "scontrol ping | grep -q UP"
}
start_node() { # start_node NAME
  alive "slurmd-$1" slurmd >/dev/null && return 0
  rm -f "$H/run/slurmd-$1.pid"
  (cd "$H/log" && "${CLEAN[@]}" /usr/sbin/slurmd -f "$SLURM_CONF" -N "$1")
  wait_for 10 "slurmd-$1" alive "slurmd-$1" slurmd
}
steps_of() { # slurmstepds of a node: they hold that node's log file open
  local p f
  for p in $(pgrep slurmstepd || true); do
    for f in /proc/"$p"/fd/*; do
      if [ "$(readlink "$f" 2>/dev/null)" = "$H/log/slurmd-$1.log" ]; then echo "$p"; break; fi
    done
  done
}
tree_of() { # pids and all their descendants
  local q=("$@") p c
  while [ ${#q[@]} -gt 0 ]; do p=${q[0]}; q=("${q[@]:1}"); echo "$p"; for c in $(pgrep -P "$p" || true); do q+=("$c"); done; done
}
shoot() { # shoot DAEMON
  local p; p=$(alive "$1" "$1") || return 0
  kill -KILL "$p"; rm -f "$H/run/$1.pid"
}
node_kill() {
  local p; p=$(alive "slurmd-$1" slurmd) || { log "slurmd $1 is not running"; return 0; }
  kill -KILL "$p"; rm -f "$H/run/slurmd-$1.pid"; echo "killed slurmd $1 ($p)"
}
node_crash() {
  local steps all
  node_kill "$1"; steps=$(steps_of "$1")
  all=$( { [ -z "$steps" ] || tree_of $steps
           [ ! -d "$CG/freezer/slurm_$1" ] || find "$CG/freezer/slurm_$1" -name cgroup.procs -exec cat {} +; } | sort -un)
  [ -z "$all" ] || { kill -KILL $all 2>/dev/null || true; echo "killed steps and tasks of $1:" $all; }
}
nodes_ready() { [ "$(sinfo -h -N -p batch -o '%T' | grep -cE '^(idle|mixed|allocated|completing|planned)$')" = "$NODES" ]; }

port_free() { ! (exec 3<>"/dev/tcp/$ADDR/$1") 2>/dev/null; }
up() {
  do_install
  if ! alive slurmctld slurmctld >/dev/null && ! port_free "$CTLD_PORT"; then
    die "port $CTLD_PORT is taken: set LSWEEP_SLURM_PORT (two clusters need bases 1000 apart)"
  fi
  write_conf
  start_munge; start_mysql; start_dbd; start_ctld
  local i; for ((i = 1; i <= NODES; i++)); do start_node "$N$i"; done
  # a node that was shot earlier may be DOWN with an admin reason; ReturnToService=2 handles the rest
  sleep 0.2
  if ! nodes_ready; then scontrol update "nodename=$N[1-$NODES]" state=resume >/dev/null 2>&1 || true; fi
  wait_for 30 "idle nodes" nodes_ready
}
down() {
  [ -d "$H/run" ] || { log "nothing at $H"; return 0; }
  local i p e
  if alive slurmctld slurmctld >/dev/null && scontrol ping 2>/dev/null | grep -q UP; then
    scancel -Q --user="$ME" 2>/dev/null || true
    for ((i = 0; i < 80; i++)); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
    [ -z "$(squeue -h 2>/dev/null)" ] || { scancel -Q -f -s KILL --user="$ME" 2>/dev/null || true; sleep 1; }
  fi
  for p in "$H"/run/slurmd-*.pid; do [ -e "$p" ] && { p=${p##*/}; stop "${p%.pid}" slurmd; }; done
  stop slurmctld slurmctld 15
  # job steps that outlived their slurmd: only processes whose own environment names our slurm.conf
  for p in $(pgrep slurmstepd || true); do
    if tr '\0' '\n' 2>/dev/null <"/proc/$p/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"; then
      log "left-over slurmstepd $p"; kill -TERM "$p" 2>/dev/null || true
    fi
  done
  for p in "$CG"/{freezer,memory}/slurm_"$N"[0-9]*; do [ ! -d "$p" ] || find "$p" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
  stop slurmdbd slurmdbd 15; stop mariadbd mariadbd 20; stop munged munged
  if [ "${1:-}" = --purge ]; then rm -rf "$H"; fi
}
status() {
  local rc=0 d p i
  for d in munged:munged mariadbd:mariadbd slurmdbd:slurmdbd slurmctld:slurmctld \
           $(for ((i = 1; i <= NODES; i++)); do echo "slurmd-$N$i:slurmd"; done); do
    if p=$(alive "${d%%:*}" "${d##*:}"); then echo "${d%%:*} $p"; else echo "${d%%:*} -"; rc=1; fi
  done
  [ $rc = 0 ] || return $rc
  sinfo -N -p batch -o '%N %T %C %m %E' && squeue && nodes_ready
}

# one of us at a time (pytest-xdist, two shells).  -o: the daemons must not inherit the lock.
case ${1:-} in
  up | down | start | stop | node-*)
    if [ -z "${_LSWEEP_SLURM_LOCKED:-}" ]; then
      mkdir -p "$(dirname "$H")"
      _LSWEEP_SLURM_LOCKED=1 exec flock -o "$H.lock" "$0" "$@"
    fi ;;
esac
case ${1:-} in
  up) up; status ;;
  down) down "${2:-}" ;;
  status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  start) "start_${2#slurm}" ;;
  stop) shoot "$2" ;;
  node-kill) node_kill "$N$2" ;;
  node-crash) node_crash "$N$2" ;;
  node-start) start_node "$N$2" ;;
  *) sed -n '2,19p' "$0"; exit 2 ;;
esac
