//! What of a stream is there already: taken together, so that what follows is done once for all of it.

use std::{future::poll_fn, pin::Pin, task::Poll};

use tokio_stream::Stream;

/// Waits for an item, and takes along what else is there, up to `most`. Nothing: the stream has ended.
pub(crate) async fn some<S: Stream + Unpin>(stream: &mut S, most: usize) -> Vec<S::Item> {
    let mut taken = Vec::new();
    poll_fn(|context| {
        while taken.len() < most {
            match Pin::new(&mut *stream).poll_next(context) {
                Poll::Ready(Some(item)) => taken.push(item),
                Poll::Pending if taken.is_empty() => return Poll::Pending,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(())
    })
    .await;
    taken
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    #[tokio::test]
    async fn what_is_there_is_taken_in_order_and_no_more_than_asked_for() {
        let (sender, receiver) = mpsc::channel(8);
        let mut stream = ReceiverStream::new(receiver);
        for number in 0..5 {
            sender.send(number).await.unwrap();
        }
        assert_eq!(some(&mut stream, 3).await, [0, 1, 2]);
        assert_eq!(some(&mut stream, 3).await, [3, 4]);
        let waiting = tokio::spawn(async move { some(&mut stream, 3).await });
        sender.send(5).await.unwrap();
        assert_eq!(waiting.await.unwrap(), [5]);
    }

    #[tokio::test]
    async fn the_end_of_a_stream_is_nothing() {
        let mut stream = tokio_stream::iter([1, 2]);
        assert_eq!(some(&mut stream, 5).await, [1, 2]);
        assert_eq!(some(&mut stream, 5).await, [0; 0]);
    }
}
