//! The share of a slot in what its node sends (`shaper_common::pool`).

use shaper_common::{
    abi::{Claims, Clock, POOL_EGRESS, Pool, Share},
    clock,
    pool::{self, Claim, Terms, WINDOWS},
};

use crate::{
    atomic,
    maps::{CLAIMS, CLOCK, PACE, POOL, SHARE},
};

/// The share of a slot that is in the pool. With its first packet in a window it claims for the windows to come, and is granted
/// something for this one.
///
#[inline(always)]
pub fn keep_up(slot: u32, now_ns: u64) -> Option<*mut Share> {
    let share = SHARE.get_ptr_mut(slot)?;
    // SAFETY: words of a live map value.
    unsafe {
        if atomic::load(&raw const (*share).is_in) == 0 {
            return None;
        }
        let (window, before) = (pool::window(now_ns), atomic::load(&raw const (*share).window));
        if window > before && atomic::compare_exchange(&raw mut (*share).window, before, window) {
            shaper_refresh_share(slot, now_ns, before);
        }
    }
    Some(share)
}

/// Notes what a slot has sent, if it is in the pool.
///
/// # Safety
/// `share` is a live map value.
#[inline(always)]
pub unsafe fn note(share: Option<*mut Share>, bytes: u64) {
    if let Some(share) = share {
        // SAFETY: the caller's promise.
        unsafe { atomic::fetch_add(&raw mut (*share).sent, bytes) };
    }
}

/// The mean rate of what a slot was allowed since it was asked last, `elapsed_us` ago, bytes a second; `None`: it is in no
/// pool.
pub fn mean_rate(slot: u32, elapsed_us: u64, now_ns: u64) -> Option<u64> {
    let share = SHARE.get_ptr_mut(slot)?;
    // SAFETY: words of a live map value.
    unsafe {
        if atomic::load(&raw const (*share).is_in) == 0 {
            return None;
        }
        let allowance = allowance(share, now_ns);
        let before = atomic::swap(&raw mut (*share).epoch_allowance, allowance);
        Some(pool::rate(allowance.saturating_sub(before), elapsed_us * 1000))
    }
}

/// All that a slot was ever allowed, up to now, bytes.
#[inline(always)]
unsafe fn allowance(share: *mut Share, now_ns: u64) -> u64 {
    // SAFETY: words of a live map value.
    unsafe {
        let before = atomic::swap(&raw mut (*share).allowance_at_ns, now_ns);
        let more = pool::allowance(atomic::load(&raw const (*share).grant), now_ns.saturating_sub(before));
        atomic::fetch_add(&raw mut (*share).allowance, more) + more
    }
}

/// What is done once in a window; of all who look at a slot only one calls this then.
///
/// It is a global function, of numbers alone: the verifier looks at it once, rather than in each state in which a packet can
/// come here, which were nine tenths of its work on `net_egress`. It says nothing, but the kernel wants a number.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn shaper_refresh_share(slot: u32, now_ns: u64, before: u64) -> u32 {
    let (Some(share), Some(clock)) = (SHARE.get_ptr_mut(slot), CLOCK.get_ptr_mut(slot)) else { return 0 };
    let Some(pool) = POOL.get_ptr_mut(POOL_EGRESS) else { return 0 };
    let window = pool::window(now_ns);
    // SAFETY: words of live map values.
    unsafe {
        advance(pool, window, now_ns);
        let allowance = allowance(share, now_ns);
        let granted = atomic::load(&raw const (*share).grant);
        let terms = Terms {
            guarantee: atomic::load(&raw const (*share).guarantee),
            ceiling: atomic::load(&raw const (*share).ceiling),
            weight: atomic::load(&raw const (*share).weight),
        };
        let is_new = window - before > pool::STRANGER;
        let elapsed = now_ns.saturating_sub(atomic::load(&raw const (*share).since_ns));
        let allowed = allowance.saturating_sub(atomic::load(&raw const (*share).since_allowance));
        let sent = atomic::load(&raw const (*share).sent);
        let noted = atomic::swap(&raw mut (*share).noted, sent);
        atomic::fetch_add(&raw mut (*pool).sent, sent.saturating_sub(noted));
        let sent_since = sent.saturating_sub(atomic::load(&raw const (*share).since_sent));
        let before = Claim::from_word(atomic::load(&raw const (*share).claim));
        let wants = if is_new {
            Some(Claim::OPEN)
        } else {
            pool::judge(before, terms, granted, sent_since, allowed, elapsed)
        };
        if let Some(claim) = wants {
            atomic::store(&raw mut (*share).claim, claim.word());
            atomic::store(&raw mut (*share).since_ns, now_ns);
            atomic::store(&raw mut (*share).since_allowance, allowance);
            atomic::store(&raw mut (*share).since_sent, sent);
        }
        let claim = wants.unwrap_or(before);

        let opens = make_claims(share, claim, terms, window, window + pool::ahead(claim, granted));
        let made = pool::made(claim, opens, atomic::load(&raw const (*share).claimed) - window);
        let Some(claims) = claims(window) else { return 0 };
        let claims = Claims {
            weights: atomic::load(&raw const (*claims).weights),
            guarantees: atomic::load(&raw const (*claims).guarantees),
            settled: atomic::load(&raw const (*claims).settled),
            reserved: 0,
        };
        let (capacity, trim) =
            (atomic::load(&raw const (*pool).capacity), atomic::load(&raw const (*pool).trim));
        let grant = pool::grant(capacity, trim, claims, terms, made, if is_new { 0 } else { granted });
        if grant != granted {
            atomic::store(&raw mut (*share).grant, grant);
            apply(slot, clock, grant);
        }
    }
    0
}

/// From now on the slot may send so many bytes a second.
#[inline(always)]
unsafe fn apply(slot: u32, clock: *mut Clock, grant: u64) {
    // SAFETY: words of live map values.
    unsafe {
        if let Some(pace) = PACE.get_ptr_mut(slot) {
            atomic::store(&raw mut (*pace).rate, grant);
        }
        let price = clock::price(grant);
        atomic::store(&raw mut (*clock).credit, clock::credit(price));
        atomic::store(&raw mut (*clock).stream_slack, clock::stream_slack(price));
        atomic::store(&raw mut (*clock).price, price);
    }
}

/// Claims for the windows from this one until that, as far as that is not done; returns of which the slot claims what there
/// is.
#[inline(always)]
unsafe fn make_claims(share: *mut Share, claim: Claim, terms: Terms, window: u64, until: u64) -> u64 {
    // SAFETY: words of live map values.
    unsafe {
        let mut claimed = atomic::load(&raw const (*share).claimed);
        let mut opens = atomic::load(&raw const (*share).opens);
        if claimed < window {
            claimed = window - 1;
        }
        for _ in 0..WINDOWS {
            if claimed >= until {
                break;
            }
            claimed += 1;
            opens = opens << 1 | claim.is_open() as u64;
            let Some(claims) = claims(claimed) else { break };
            if claim.is_open() {
                atomic::fetch_add(&raw mut (*claims).weights, terms.weight as u64);
                atomic::fetch_add(&raw mut (*claims).guarantees, terms.guarantee);
            } else {
                atomic::fetch_add(&raw mut (*claims).settled, claim.word());
            }
        }
        atomic::store(&raw mut (*share).claimed, claimed);
        atomic::store(&raw mut (*share).opens, opens);
        opens
    }
}

/// The first packet of all in a window makes room for the claims of later ones, and looks now and then whether what was sent
/// is what the pool carries.
#[inline(always)]
unsafe fn advance(pool: *mut Pool, window: u64, now_ns: u64) {
    // SAFETY: words of live map values.
    unsafe {
        let before = atomic::load(&raw const (*pool).window);
        if window <= before || !atomic::compare_exchange(&raw mut (*pool).window, before, window) {
            return;
        }
        let mut cleared = before + WINDOWS - 1;
        if cleared < window {
            cleared = window - 1;
        }
        for _ in 0..WINDOWS {
            if cleared >= window + WINDOWS - 1 {
                break;
            }
            cleared += 1;
            let Some(claims) = claims(cleared) else { break };
            atomic::store(&raw mut (*claims).weights, 0);
            atomic::store(&raw mut (*claims).guarantees, 0);
            atomic::store(&raw mut (*claims).settled, 0);
        }
        let is_wanted = match claims(window) {
            Some(claims) => atomic::load(&raw const (*claims).weights) > 0,
            None => false,
        };
        if !is_wanted {
            atomic::fetch_add(&raw mut (*pool).unwanted, 1);
        }
        let elapsed = now_ns.saturating_sub(atomic::load(&raw const (*pool).since_ns));
        let goes_on = pool::goes_on(window - before);
        if goes_on && elapsed < pool::TRIM_NS {
            return;
        }
        let sent = atomic::swap(&raw mut (*pool).sent, 0);
        let was_wanted = atomic::swap(&raw mut (*pool).unwanted, 0) == 0;
        atomic::store(&raw mut (*pool).since_ns, now_ns);
        if goes_on {
            let capacity = atomic::load(&raw const (*pool).capacity);
            let trim = atomic::load(&raw const (*pool).trim);
            atomic::store(&raw mut (*pool).trim, pool::trim(trim, capacity, sent, elapsed, was_wanted));
        }
    }
}

#[inline(always)]
fn claims(window: u64) -> Option<*mut Claims> {
    CLAIMS.get_ptr_mut(POOL_EGRESS * WINDOWS as u32 + (window % WINDOWS) as u32)
}
