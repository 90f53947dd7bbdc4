// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The CPU scheduler `shaper`: sched_ext, for the agent's `--cpu-backend scx`. What it obeys are the files of the cgroups
 * (cpu.weight, cpu.max, cpu.max.burst), which the kernel hands it at each write: when it is gone, however that came about,
 * the kernel's own scheduler goes on with the same limits. It reads no map of the agent's.
 *
 * Order. Each cgroup has a virtual time, which goes on by what its tasks use, divided by its weight. A task that wants a CPU
 * is queued at the virtual time that its cgroup has, which goes on by a slice at once (and gets back later what of that was
 * not used), so that the tasks of one cgroup stand one slice apart: start-time fair queueing with cgroups as flows. Tasks of
 * the root cgroup are flows of their own, as with the kernel's scheduler. Weights are flat: a cgroup's counts against that of
 * every other cgroup that wants a CPU, not only of its siblings (docs/decisions/0015).
 *
 * Queues. One for all CPUs, and one for each CPU with the tasks that may run nowhere else, so that nobody searches among
 * those. A CPU takes what is first in both, or goes on with what it has where that comes before; it idles only if neither
 * holds anything that may run on it.
 *
 * Quotas. As the kernel's: each period a cgroup gets its quota, keeps at most quota and burst, and what it uses beyond is
 * missing from the next. A cgroup has no more than any above it. It is looked at when a task is about to run and at each tick;
 * who is without is parked until the timer finds that there is some.
 *
 * Stalls. The kernel throws out a scheduler that leaves a task waiting (here for 20 s). What waits for more than 5 s, for want
 * of weight or of quota, runs for a slice; with its quota it makes up for that afterwards.
 */
#include "kernel.h"

char licence[] SEC("license") = "Dual MIT/GPL";

#define MS 1000000ULL
#define NONE (~0ULL)

#define SLICE (3 * MS)
/* How far behind the others a cgroup may be that always wants a CPU, and one that had none to want. */
#define LAG (50 * MS)
#define LAG_WOKEN SLICE
#define OVERDUE (5000 * MS)
#define RESCUE_EVERY (500 * MS)
#define TIMEOUT_MS 20000
/* The timer's bounds. */
#define SOONEST (MS / 2)
#define LATEST (1000 * MS)

#define WEIGHT_DEFAULT 100
#define MAX_CPUS 1024
#define MAX_CGROUPS 65536
/* A limit that is further above a cgroup than this would not be seen. */
#define MAX_DEPTH 24
/* How many of a queue one look goes through. Those behind are left to the kernel's own search. */
#define MAX_LOOK 64
#define MAX_RESCUE 8

/* Cgroup ids are below 2^62. */
#define SHARED (1ULL << 62)
#define PARKED (SHARED + 1)
#define OF_CPU(cpu) (SHARED + 2 + (cpu))

/* A cgroup with a cpu controller, by its id. The root is none. */
struct group {
	u64 parent;
	u64 vtime;
	u64 weight;
	/* Nanoseconds each; no quota is NONE. */
	u64 quota;
	u64 period;
	u64 burst;
	s64 budget;
	u64 refill_at;
	/* How many tasks the timer has let go in its last round. */
	u64 round;
	u64 let_go;
};

struct task {
	u64 group;
	/* Of a task of the root cgroup. */
	u64 vtime;
	/* se.sum_exec_runtime of what is charged. */
	u64 charged;
	/* By how much its flow went on for a slice that it has not used yet. */
	u64 ahead;
	/* Since when it waits, for anything. */
	u64 waits_since;
	/* Runs for a slice whatever its quota is. */
	u64 is_overdue;
};

struct wakeup {
	struct bpf_timer timer;
};

/* What user space is told once this has ended. */
struct ended {
	s64 kind;
	s64 code;
	char reason[128];
	char message[384];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_CGROUPS);
	__type(key, u64);
	__type(value, struct group);
} groups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct task);
} tasks SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct wakeup);
} wakeups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} rescued_at SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} events SEC(".maps");

/* The virtual time of what was taken last. */
u64 vnow;
/* How many cgroups have a quota. */
u64 limited;
/* For when the timer is set. */
u64 wake_at = NONE;
u64 rounds;

inlined bool before(u64 a, u64 b)
{
	return (s64)(a - b) < 0;
}

inlined struct group *group_of(u64 id)
{
	return bpf_map_lookup_elem(&groups, &id);
}

inlined struct task *task_of(struct task_struct *p)
{
	return bpf_task_storage_get(&tasks, p, 0, 0);
}

/* --- quotas --- */

inlined void refill(struct group *group, u64 now)
{
	u64 at = group->refill_at, period = group->period, quota = group->quota, periods;
	s64 budget, full;

	if (before(now, at) || !period)
		return;
	periods = (now - at) / period + 1;
	if (__sync_val_compare_and_swap(&group->refill_at, at, at + periods * period) != at)
		return; /* another CPU does it */
	budget = group->budget;
	full = quota + group->burst;
	/* What is used meanwhile is not lost: this adds a difference. */
	if (periods > 1000 || budget + (s64)(periods * quota) > full)
		__sync_fetch_and_add(&group->budget, full - budget);
	else
		__sync_fetch_and_add(&group->budget, (s64)(periods * quota));
}

/* 0 if a task of this cgroup may run, else when the quota that it lacks is filled up next. */
verified_alone u64 lacks_until(u64 id, u64 now)
{
	u64 until = 0;
	u32 depth;

	for (depth = 0; depth < MAX_DEPTH; depth++) {
		struct group *group = group_of(id);

		if (!group)
			break;
		if (group->quota != NONE) {
			refill(group, now);
			if (group->budget <= 0 && before(until, group->refill_at))
				until = group->refill_at;
		}
		id = group->parent;
	}
	return until;
}

verified_alone int spend(u64 id, u64 used)
{
	u32 depth;

	for (depth = 0; depth < MAX_DEPTH; depth++) {
		struct group *group = group_of(id);

		if (!group)
			break;
		if (group->quota != NONE)
			__sync_fetch_and_add(&group->budget, -(s64)used);
		id = group->parent;
	}
	return 0;
}

inlined bool may_run(struct task *task, u64 now)
{
	return !limited || task->is_overdue || !lacks_until(task->group, now);
}

/* Has the timer come no later than `at`. */
inlined void wake_by(u64 at, u64 now)
{
	u32 zero = 0;
	struct wakeup *wakeup = bpf_map_lookup_elem(&wakeups, &zero);
	u64 in = before(at, now + SOONEST) ? SOONEST : at - now;

	if (!wakeup || (wake_at != NONE && !before(now + in, wake_at)))
		return;
	wake_at = now + in;
	bpf_timer_start(&wakeup->timer, in, 0);
}

/* --- virtual time --- */

/* How much further a flow is after `ns`. */
inlined u64 stretched(u64 ns, u64 weight)
{
	return ns * WEIGHT_DEFAULT / (weight ?: WEIGHT_DEFAULT);
}

/* The virtual time of a task's flow, no further behind than `lag`. */
inlined u64 catch_up(u64 *vtime, u64 lag)
{
	u64 at = *vtime, floor = vnow - lag;

	if (!before(at, floor))
		return at;
	__sync_val_compare_and_swap(vtime, at, floor);
	return floor;
}

/* Where in the order a task stands that is to have a slice. */
inlined u64 take_place(struct task_struct *p, struct task *task, u64 lag)
{
	struct group *group = group_of(task->group);
	u64 *vtime = group ? &group->vtime : &task->vtime;

	catch_up(vtime, lag);
	/* It had a place that it did not use: its affinity was changed, or it was parked. */
	__sync_fetch_and_add(vtime, -task->ahead);
	task->ahead = stretched(SLICE, group ? group->weight : p->scx.weight);
	return __sync_fetch_and_add(vtime, task->ahead);
}

/* Charges a task that runs, or has just run, with what it used. Returns the virtual time of its flow. */
inlined u64 charge(struct task_struct *p, struct task *task, bool is_over)
{
	struct group *group = group_of(task->group);
	u64 *vtime = group ? &group->vtime : &task->vtime;
	u64 total = p->se.sum_exec_runtime, used = total - task->charged;
	u64 further = stretched(used, group ? group->weight : p->scx.weight), paid;

	task->charged = total;
	paid = further < task->ahead ? further : task->ahead;
	task->ahead -= paid;
	further -= paid;
	if (is_over) {
		further -= task->ahead;
		task->ahead = 0;
	}
	if (further)
		__sync_fetch_and_add(vtime, further);
	if (limited && used)
		spend(task->group, used);
	return *vtime;
}

/* --- queues --- */

inlined u64 queue_of(struct task_struct *p)
{
	return p->nr_cpus_allowed == 1 ? OF_CPU(bpf_cpumask_first(p->cpus_ptr)) : SHARED;
}

/* Wakes a CPU that idles and may run it. */
inlined void wake_cpu_for(struct task_struct *p)
{
	s32 cpu;

	if (p->nr_cpus_allowed == 1) {
		scx_bpf_kick_cpu(bpf_cpumask_first(p->cpus_ptr), SCX_KICK_IDLE);
		return;
	}
	cpu = scx_bpf_pick_idle_cpu(p->cpus_ptr, 0);
	if (cpu >= 0)
		scx_bpf_kick_cpu(cpu, SCX_KICK_IDLE);
}

SEC("struct_ops/shaper_select_cpu")
s32 shaper_select_cpu(u64 *ctx)
{
	struct task_struct *p = (void *)ctx[0];
	s32 prev_cpu = ctx[1];
	u64 wake_flags = ctx[2];
	struct task *task = task_of(p);
	bool is_idle = false;
	s32 cpu;

	/* Who may not run must not have a CPU that idles: nobody else would be given it. */
	if (!task || !may_run(task, bpf_ktime_get_ns()))
		return prev_cpu;
	cpu = scx_bpf_select_cpu_dfl(p, prev_cpu, wake_flags, &is_idle);
	if (is_idle) {
		take_place(p, task, LAG_WOKEN);
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, SLICE, 0);
	}
	return cpu;
}

SEC("struct_ops/shaper_enqueue")
void shaper_enqueue(u64 *ctx)
{
	struct task_struct *p = (void *)ctx[0];
	u64 enq_flags = ctx[1];
	struct task *task = task_of(p);
	bool is_woken = enq_flags & SCX_ENQ_WAKEUP;
	u64 now = bpf_ktime_get_ns(), until;

	if (unlikely(!task)) {
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, SLICE, enq_flags);
		return;
	}
	/* What a CPU does for itself goes first. A thread that goes on and on has its place in the order. */
	if (is_woken && (p->flags & PF_KTHREAD) && p->nr_cpus_allowed == 1) {
		take_place(p, task, LAG_WOKEN);
		scx_bpf_dsq_insert(p, SCX_DSQ_LOCAL, SLICE, enq_flags | SCX_ENQ_PREEMPT);
		return;
	}
	task->waits_since = now;
	if (limited && (until = lacks_until(task->group, now))) {
		scx_bpf_dsq_insert(p, PARKED, SLICE, enq_flags);
		wake_by(until, now);
		return;
	}
	scx_bpf_dsq_insert_vtime(p, queue_of(p), SLICE, take_place(p, task, is_woken ? LAG_WOKEN : LAG), enq_flags);
	wake_cpu_for(p);
}

/*
 * The virtual time of the first task of a queue that this CPU may run; NONE if there is none. Those before it that have no
 * quota left are parked.
 */
verified_alone u64 first_of(u64 queue, s32 cpu, u64 now)
{
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;
	u64 first = NONE;
	u32 looks = 0;

	bpf_iter_scx_dsq_new(&it, queue, 0);
	while ((p = bpf_iter_scx_dsq_next(&it))) {
		struct task *task;

		if (!bpf_cpumask_test_cpu(cpu, p->cpus_ptr)) {
			/* Behind so many there may be one: the kernel finds it. */
			if (++looks < MAX_LOOK)
				continue;
			first = p->scx.dsq_vtime;
			break;
		}
		task = task_of(p);
		if (limited && task && !task->is_overdue && ++looks < MAX_LOOK) {
			u64 until = lacks_until(task->group, now);

			if (until) {
				scx_bpf_dsq_move(&it, p, PARKED, 0);
				wake_by(until, now);
				continue;
			}
		}
		first = p->scx.dsq_vtime;
		break;
	}
	bpf_iter_scx_dsq_destroy(&it);
	return first;
}

inlined bool take(u64 queue, u64 at)
{
	if (at == NONE || !scx_bpf_dsq_move_to_local(queue))
		return false;
	if (before(vnow, at))
		vnow = at;
	return true;
}

/* Lets what has waited for too long, which is at the end, go first. */
verified_alone int rescue(u64 queue, u64 now)
{
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;
	u32 looks = 0;

	bpf_iter_scx_dsq_new(&it, queue, SCX_DSQ_ITER_REV);
	while ((p = bpf_iter_scx_dsq_next(&it)) && looks++ < MAX_RESCUE) {
		struct task *task = task_of(p);

		if (!task || before(now, task->waits_since + OVERDUE))
			continue;
		scx_bpf_dsq_move_set_vtime(&it, vnow - 2 * LAG);
		scx_bpf_dsq_move_vtime(&it, p, queue, 0);
	}
	bpf_iter_scx_dsq_destroy(&it);
	return 0;
}

SEC("struct_ops/shaper_dispatch")
void shaper_dispatch(u64 *ctx)
{
	s32 cpu = ctx[0];
	struct task_struct *prev = (void *)ctx[1];
	u64 now = bpf_ktime_get_ns(), own = OF_CPU(cpu), of_own, of_shared, of_prev = NONE;
	struct task *task = 0;
	u32 zero = 0;
	u64 *rescued = bpf_map_lookup_elem(&rescued_at, &zero);

	if (rescued && before(*rescued + RESCUE_EVERY, now)) {
		*rescued = now;
		rescue(own, now);
		rescue(SHARED, now);
	}
	if (prev && (prev->scx.flags & SCX_TASK_QUEUED)) {
		task = task_of(prev);
		if (task) {
			of_prev = charge(prev, task, true);
			if (limited && lacks_until(task->group, now))
				task = 0;
		}
	}
	of_own = first_of(own, cpu, now);
	of_shared = first_of(SHARED, cpu, now);

	/* It goes on if it would be the first. */
	if (!task || (of_own != NONE && !before(of_prev, of_own)) ||
	    (of_shared != NONE && !before(of_prev, of_shared))) {
		if (of_own != NONE && (of_shared == NONE || before(of_own, of_shared))) {
			if (take(own, of_own) || take(SHARED, of_shared))
				return;
		} else if (take(SHARED, of_shared) || take(own, of_own)) {
			return;
		}
	}
	if (task && prev) {
		u64 at = take_place(prev, task, LAG);

		if (before(vnow, at))
			vnow = at;
		prev->scx.slice = SLICE;
	}
}

SEC("struct_ops/shaper_running")
void shaper_running(u64 *ctx)
{
	struct task_struct *p = (void *)ctx[0];
	struct task *task = task_of(p);

	if (!task)
		return;
	task->charged = p->se.sum_exec_runtime;
	task->is_overdue = 0;
}

SEC("struct_ops/shaper_tick")
void shaper_tick(u64 *ctx)
{
	struct task_struct *p = (void *)ctx[0];
	struct task *task = task_of(p);

	if (!task)
		return;
	charge(p, task, false);
	if (limited && lacks_until(task->group, bpf_ktime_get_ns()))
		p->scx.slice = 0;
}

SEC("struct_ops/shaper_stopping")
void shaper_stopping(u64 *ctx)
{
	struct task_struct *p = (void *)ctx[0];
	struct task *task = task_of(p);

	if (task)
		charge(p, task, true);
}

/* --- the timer --- */

/* Lets parked tasks go whose cgroups have quota again, as many as it may last for. */
static int look_at_parked(void *map, u32 *key, struct wakeup *wakeup)
{
	u64 now = bpf_ktime_get_ns(), round = ++rounds, next = now + LATEST;
	struct bpf_iter_scx_dsq it;
	struct task_struct *p;

	wake_at = NONE;
	bpf_iter_scx_dsq_new(&it, PARKED, 0);
	while ((p = bpf_iter_scx_dsq_next(&it))) {
		struct task *task = task_of(p);
		struct group *group;
		u64 until;

		if (!task)
			continue;
		until = limited ? lacks_until(task->group, now) : 0;
		group = group_of(task->group);
		if (!until && group && group->quota != NONE) {
			if (group->round != round) {
				group->round = round;
				group->let_go = 0;
			}
			if ((s64)(group->let_go * SLICE) > group->budget)
				until = now + SLICE;
			else
				group->let_go++;
		}
		if (until) {
			if (before(now, task->waits_since + OVERDUE)) {
				if (before(until, next))
					next = until;
				continue;
			}
			task->is_overdue = 1;
		}
		scx_bpf_dsq_move_set_slice(&it, SLICE);
		scx_bpf_dsq_move_set_vtime(&it, take_place(p, task, LAG));
		if (scx_bpf_dsq_move_vtime(&it, p, queue_of(p), 0))
			wake_cpu_for(p);
	}
	bpf_iter_scx_dsq_destroy(&it);
	if (limited || scx_bpf_dsq_nr_queued(PARKED) > 0)
		wake_by(next, bpf_ktime_get_ns());
	return 0;
}

/* --- tasks and cgroups --- */

SEC("struct_ops.s/shaper_init_task")
s32 shaper_init_task(u64 *ctx)
{
	struct task_struct *p = (void *)ctx[0];
	struct scx_init_task_args *args = (void *)ctx[1];
	struct task *task = bpf_task_storage_get(&tasks, p, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);

	if (!task)
		return -12; /* ENOMEM */
	task->group = args->cgroup->kn->id;
	task->vtime = vnow;
	return 0;
}

SEC("struct_ops/shaper_cgroup_move")
void shaper_cgroup_move(u64 *ctx)
{
	struct task_struct *p = (void *)ctx[0];
	struct cgroup *to = (void *)ctx[2];
	struct task *task = task_of(p);
	struct group *group;

	if (!task)
		return;
	group = group_of(task->group);
	if (group)
		__sync_fetch_and_add(&group->vtime, -task->ahead);
	task->ahead = 0;
	task->vtime = vnow;
	task->group = to->kn->id;
}

inlined void set_quota(struct group *group, u64 period_us, u64 quota_us, u64 burst_us)
{
	u64 now = bpf_ktime_get_ns(), old = group->quota, quota = NONE;

	if (quota_us != NONE && quota_us < NONE / 1000)
		quota = quota_us * 1000;
	group->period = period_us * 1000;
	group->burst = burst_us * 1000;
	if (old == NONE && quota != NONE) {
		group->budget = quota;
		group->refill_at = now + group->period;
		group->quota = quota;
		__sync_fetch_and_add(&limited, 1);
	} else if (old != NONE && quota == NONE) {
		group->quota = quota;
		__sync_fetch_and_add(&limited, -1);
	} else if (quota != NONE) {
		group->quota = quota;
		/* What the period has more or less acts at once. */
		__sync_fetch_and_add(&group->budget, (s64)(quota - old));
		if (before(now + group->period, group->refill_at))
			group->refill_at = now + group->period;
	}
}

/*
 * Leaves the CPUs to the kernel's scheduler, which holds the same limits: better than not to hold one, and than to keep others
 * from making a cgroup.
 */
#define give_up(why) scx_bpf_error_bstr(why, &nothing, 0)

/* Not const: the kernel takes formats from memory that can be written to. */
static char too_deep[] = "a cgroup more than 23 levels below the root";
static char too_many[] = "no room for one more cgroup";
static u64 nothing;

SEC("struct_ops.s/shaper_cgroup_init")
s32 shaper_cgroup_init(u64 *ctx)
{
	struct cgroup *cgroup = (void *)ctx[0];
	struct scx_cgroup_init_args *args = (void *)ctx[1];
	struct group fresh = { .weight = args->weight, .quota = NONE, .vtime = vnow };
	u64 id = cgroup->kn->id;

	if (cgroup->level == 0)
		return 0;
	if (cgroup->level >= MAX_DEPTH) {
		give_up(too_deep);
		return 0;
	}
	fresh.parent = cgroup->self.parent->cgroup->kn->id;
	set_quota(&fresh, args->bw_period_us, args->bw_quota_us, args->bw_burst_us);
	if (bpf_map_update_elem(&groups, &id, &fresh, 0))
		give_up(too_many);
	return 0;
}

SEC("struct_ops/shaper_cgroup_exit")
void shaper_cgroup_exit(u64 *ctx)
{
	struct cgroup *cgroup = (void *)ctx[0];
	u64 id = cgroup->kn->id;
	struct group *group = group_of(id);

	if (!group)
		return;
	if (group->quota != NONE)
		__sync_fetch_and_add(&limited, -1);
	bpf_map_delete_elem(&groups, &id);
}

SEC("struct_ops/shaper_cgroup_set_weight")
void shaper_cgroup_set_weight(u64 *ctx)
{
	struct cgroup *cgroup = (void *)ctx[0];
	u32 weight = ctx[1];
	struct group *group = group_of(cgroup->kn->id);

	if (group)
		group->weight = weight;
}

SEC("struct_ops/shaper_cgroup_set_bandwidth")
void shaper_cgroup_set_bandwidth(u64 *ctx)
{
	struct cgroup *cgroup = (void *)ctx[0];
	struct group *group = group_of(cgroup->kn->id);
	u64 now = bpf_ktime_get_ns();

	if (!group)
		return;
	set_quota(group, ctx[1], ctx[2], ctx[3]);
	wake_by(now, now);
}

/* That CPUs come and go is nothing to this: tasks whose only CPU goes are given others by the kernel. */
SEC("struct_ops.s/shaper_cpu_online")
void shaper_cpu_online(u64 *ctx)
{
}

SEC("struct_ops.s/shaper_cpu_offline")
void shaper_cpu_offline(u64 *ctx)
{
}

/* --- beginning and end --- */

SEC("struct_ops.s/shaper_init")
s32 shaper_init(u64 *ctx)
{
	u32 cpus = scx_bpf_nr_cpu_ids(), cpu, zero = 0;
	struct wakeup *wakeup = bpf_map_lookup_elem(&wakeups, &zero);
	s32 error;

	if (!wakeup || cpus > MAX_CPUS)
		return -7; /* E2BIG */
	if ((error = bpf_timer_init(&wakeup->timer, &wakeups, CLOCK_MONOTONIC)) ||
	    (error = bpf_timer_set_callback(&wakeup->timer, look_at_parked)) ||
	    (error = scx_bpf_create_dsq(SHARED, -1)) || (error = scx_bpf_create_dsq(PARKED, -1)))
		return error;
	for (cpu = 0; cpu < MAX_CPUS && cpu < cpus; cpu++)
		if ((error = scx_bpf_create_dsq(OF_CPU(cpu), -1)))
			return error;
	return 0;
}

SEC("struct_ops/shaper_exit")
void shaper_exit(u64 *ctx)
{
	struct scx_exit_info *info = (void *)ctx[0];
	struct ended *ended = bpf_ringbuf_reserve(&events, sizeof(*ended), 0);

	if (!ended)
		return;
	ended->kind = info->kind;
	ended->code = info->exit_code;
	ended->reason[0] = ended->message[0] = 0;
	bpf_probe_read_kernel_str(ended->reason, sizeof(ended->reason), info->reason);
	bpf_probe_read_kernel_str(ended->message, sizeof(ended->message), info->msg);
	bpf_ringbuf_submit(ended, 0);
}

SEC(".struct_ops.link")
struct sched_ext_ops shaper = {
	.select_cpu = (void *)shaper_select_cpu,
	.enqueue = (void *)shaper_enqueue,
	.dispatch = (void *)shaper_dispatch,
	.tick = (void *)shaper_tick,
	.running = (void *)shaper_running,
	.stopping = (void *)shaper_stopping,
	.init_task = (void *)shaper_init_task,
	.cgroup_init = (void *)shaper_cgroup_init,
	.cgroup_exit = (void *)shaper_cgroup_exit,
	.cgroup_move = (void *)shaper_cgroup_move,
	.cgroup_set_weight = (void *)shaper_cgroup_set_weight,
	.cgroup_set_bandwidth = (void *)shaper_cgroup_set_bandwidth,
	.cpu_online = (void *)shaper_cpu_online,
	.cpu_offline = (void *)shaper_cpu_offline,
	.init = (void *)shaper_init,
	.exit = (void *)shaper_exit,
	/* So that one that has no quota left is not kept running for want of another. */
	.flags = SCX_OPS_ENQ_LAST,
	.timeout_ms = TIMEOUT_MS,
	.name = "shaper",
};
